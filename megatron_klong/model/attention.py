"""Core attention over packed rows through torch's scaled dot product attention."""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from megatron_klong.model.row import RowLayout, Span


class RotaryTable(torch.nn.Module):
    """Cosines and sines of rotary position embedding for given positions.

    Args:
        dimensions: of a head that are rotated, even.
        base: ``rope_theta``.
    """

    def __init__(self, dimensions: int, base: float) -> None:
        super().__init__()
        self._dimensions = dimensions
        self._base = base

    def forward(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """``[T]`` to cosine and sine, fp32 ``[T, 1, dimensions]``, halves repeated (rotate-half)."""
        steps = torch.arange(0, self._dimensions, 2, dtype=torch.float32, device=positions_T.device)
        angles = torch.outer(positions_T.float(), 1.0 / self._base ** (steps / self._dimensions))
        both = torch.cat([angles, angles], dim=-1).unsqueeze(1)
        return both.cos(), both.sin()


def rotate(heads_TND: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate the first dimensions of every head, as many as the table has."""
    cosine, sine = (part.to(heads_TND.dtype) for part in table)
    turned, rest = heads_TND[..., : cosine.size(-1)], heads_TND[..., cosine.size(-1) :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cosine + torch.cat([-second, first], dim=-1) * sine
    return torch.cat([turned, rest], dim=-1) if rest.size(-1) else turned


class PackedAttention(MegatronModule):
    """Causal attention inside each document of a packed row; no document sees another.

    Takes the place of Megatron's ``DotProductAttention``, which refuses packed sequences. The
    documents are computed one after the other, so the cost is the sum of their squares and no
    mask of the whole row exists. Queries and keys are rotated here, by the positions that come with the
    row: Megatron's own rotation would count them from the row's boundaries.

    With context parallelism the keys and values of the whole row are gathered, and every rank computes
    its own queries (Llama 3, section 3.3.2); the gradient is summed back to the ranks that hold them.
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
        assert not (attention_dropout or config.attention_dropout)
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: RowLayout | None = None,
    ) -> Tensor:
        """``query [T, heads, d]``, ``key`` and ``value [T, kv heads, d]`` to ``[T, heads * d]``."""
        row = packed_seq_params
        assert row is not None and row.rotary_T1D is not None, "rows are always packed"
        assert attention_mask is None and attention_bias is None
        query, key = rotate(query, row.rotary_T1D), rotate(key, row.rotary_T1D)
        if row.order_R is not None:
            key, value = self._whole_row(torch.stack([key, value], dim=1), row.order_R).unbind(1)
        query_NTD, key_NRD, value_NRD = (tensor.transpose(0, 1) for tensor in (query, key, value))
        outputs = [self._attend(span, query_NTD, key_NRD, value_NRD) for span in row.spans]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def _whole_row(self, part: Tensor, order_R: Tensor) -> Tensor:
        """``[T, ...]`` of every context-parallel rank to ``[R, ...]`` in the row's order."""
        gathered = gather_from_sequence_parallel_region(
            part, tensor_parallel_output_grad=True, group=self.context_group
        )
        return gathered.index_select(0, order_R)

    def _attend(self, span: Span, query_NTD: Tensor, key_NRD: Tensor, value_NRD: Tensor) -> Tensor:
        queries = query_NTD[:, span.start : span.stop]
        keys, values = (t[:, span.key_start : span.key_stop] for t in (key_NRD, value_NRD))
        whole = queries.size(1) == keys.size(1)
        return scaled_dot_product_attention(
            queries.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0), scale=self.softmax_scale,
            is_causal=whole, attn_mask=None if whole else causal_lower_right(queries.size(1), keys.size(1)),
            enable_gqa=True,
        ).squeeze(0)  # fmt: skip
