"""A packed row as one rank's model takes it: with context parallelism, its share of the tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_klong.data.rows import PackedRow
from megatron_klong.model.row import RowLayout, Target, context_tokens, row_layout, shifted


@dataclass(frozen=True)
class RowInputs:
    """Arguments of the model's forward pass; T are the tokens of this context-parallel rank."""

    tokens_1T: Tensor
    layout: RowLayout
    target: Target
    predicted: tuple[Target, ...]


def row_inputs(row: PackedRow, depth: int, device: torch.device) -> RowInputs:
    """This rank's share of a row.

    Args:
        depth: of multi-token prediction.
    """
    rank, ways = parallel_state.get_context_parallel_rank(), parallel_state.get_context_parallel_world_size()
    boundaries = row.cu_seqlens.astype(np.int64)
    own = context_tokens(len(row.tokens_R), rank, ways)

    def share(values_R: np.ndarray) -> Tensor:
        return torch.from_numpy(values_R[own]).to(device).unsqueeze(0)

    labels_R, mask_R = row.labels_R, row.loss_mask_R
    next_ids, predicted = [], []
    for _ in range(depth):
        next_ids.append(share(labels_R))
        labels_R, mask_R = shifted(labels_R, boundaries), shifted(mask_R, boundaries)
        predicted.append(Target(share(labels_R), share(mask_R)))
    layout = row_layout(boundaries, rank, ways, device)
    # A row without samples keeps one token: a mean over none would not be a number.
    padding = share(np.arange(len(row.tokens_R)) >= max(row.sample_tokens, 1))
    layout = replace(layout, padding_1T=padding)
    if next_ids:
        layout = replace(layout, next_ids_D1T=torch.stack(next_ids))
    target = Target(share(row.labels_R), share(row.loss_mask_R))
    return RowInputs(share(row.tokens_R), layout, target, tuple(predicted))


def whole_row(values_T: Tensor, layout: RowLayout) -> Tensor:
    """``[T]`` of every context-parallel rank to ``[R]`` on all of them, in the row's order.

    Each rank's gradient goes to its own share: all compute the same loss from the whole, once.
    """
    if layout.order_R is None:
        return values_T
    gathered: Tensor = _GatherContext.apply(values_T)
    return gathered.index_select(0, layout.order_R)


class _GatherContext(torch.autograd.Function):
    """Gather over context-parallel ranks; backward, take the own share."""

    @staticmethod
    def forward(_context: object, values_T: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        gathered = values_T.new_empty(group.size() * values_T.size(0))
        torch.distributed.all_gather_into_tensor(gathered, values_T.contiguous(), group=group)
        return gathered

    @staticmethod
    def backward(_context: object, gradient: Tensor) -> Tensor:
        group = parallel_state.get_context_parallel_group()
        return gradient.chunk(group.size())[group.rank()].contiguous()
