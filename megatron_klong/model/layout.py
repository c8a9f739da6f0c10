"""Whether a model can be divided as a layout says. Imports no torch: it is asked before a start."""

from __future__ import annotations

from megatron_klong.config import ParallelConfig
from megatron_klong.model.hf_config import Glm4MoeConfig


def check_layout(hf: Glm4MoeConfig, parallel: ParallelConfig) -> None:
    """Refuse a model that a layout cannot divide, before anything is started.

    Raises:
        ValueError: names the two fields and their values.
    """
    for name, size, by, ways in (
        ("num_key_value_heads", hf.num_key_value_heads, "tensor", parallel.tensor),
        ("vocab_size", hf.vocab_size, "tensor", parallel.tensor),
        ("intermediate_size", hf.intermediate_size, "tensor", parallel.tensor),
        ("moe_intermediate_size", hf.moe_intermediate_size, "tensor", parallel.tensor),
        ("num_hidden_layers", hf.num_hidden_layers, "pipeline", parallel.pipeline),
        ("n_routed_experts", hf.n_routed_experts, "expert", parallel.expert),
    ):
        if size % ways:
            raise ValueError(
                f"parallel.{by}={ways} does not divide the model's {name}={size}; choose a divisor of {size}"
            )
    if parallel.tensor > 1 and parallel.expert == 1:
        # With expert parallelism off, Megatron 0.16 takes experts for dense weights and never sums
        # their gradients over the tensor-parallel ranks, each of which routed other tokens.
        raise ValueError(
            f"parallel.tensor={parallel.tensor} with parallel.expert=1 would train the copies of the "
            f"experts apart; use parallel.expert={parallel.tensor} or another divisor of "
            f"n_routed_experts={hf.n_routed_experts} above 1"
        )
