"""Core attention over packed rows through torch's scaled dot product attention."""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class PackedAttention(MegatronModule):
    """Causal attention inside each document of a packed row; no document sees another.

    Takes the place of Megatron's ``DotProductAttention``, which refuses packed sequences. The
    documents are computed one after the other, so the cost is the sum of their squares and no
    mask of the whole row exists.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        assert attn_mask_type == AttnMaskType.causal and attention_type == "self"
        assert config.context_parallel_size == 1, "layouts with CP are refused by the config"
        assert not (attention_dropout or config.attention_dropout)
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """``query [T, heads, d]``, ``key`` and ``value [T, kv heads, d]`` to ``[T, heads * d]``.

        ``packed_seq_params.cu_seqlens_q`` holds the document boundaries, ``int32``, from 0 to T.
        """
        assert packed_seq_params is not None, "rows are always packed"
        assert attention_mask is None and attention_bias is None
        repeats = query.size(1) // key.size(1)
        heads_first = [
            tensor.transpose(0, 1)  # [T, n, d] -> [n, T, d]
            for tensor in (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        ]
        boundaries = packed_seq_params.cu_seqlens_q.tolist()
        lengths = [stop - start for start, stop in zip(boundaries, boundaries[1:], strict=False)]
        documents = zip(*(tensor.split(lengths, dim=1) for tensor in heads_first), strict=True)
        outputs = [
            scaled_dot_product_attention(
                q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), is_causal=True, scale=self.softmax_scale
            ).squeeze(0)
            for q, k, v in documents
        ]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)
