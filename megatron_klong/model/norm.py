"""RMSNorm for Megatron-Core without Transformer Engine, with sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class RMSNorm(torch.nn.Module):
    """Root mean square norm over the last dimension, computed in fp32.

    Megatron's local spec wraps ``torch.nn.RMSNorm``, which refuses sequence parallelism, and MoE
    with tensor parallelism needs it. Here the weight is marked ``sequence_parallel``, so that
    Megatron sums its gradient over the tensor-parallel ranks, each of which sees other tokens.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """``[..., hidden_size]`` to the same shape and dtype."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(hidden.dtype)
