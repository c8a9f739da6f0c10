"""A packed row as the model's layers see it: who attends to whom, and where each token stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens of this rank that lie in one document.

    Attributes:
        start, stop: of the queries, in the rank's own tokens.
        key_start, key_stop: of what the last of them sees, in the whole row: the document up to it.
    """

    start: int
    stop: int
    key_start: int
    key_stop: int


@dataclass
class RowLayout(PackedSeqParams):
    """What travels with a row through Megatron's layers, in the place of its ``PackedSeqParams``.

    Attributes:
        spans: this rank's tokens, document by document.
        positions_T: int64, of each of this rank's tokens, given and not derived from the row.
        order_R: int64, where each token of the row lies among the tokens of all context-parallel ranks
            one after the other; None where a rank has the whole row.
        rotary_T1D: cosine and sine for the positions, fp32; the model fills them in.
        padding_1T: bool, tokens that routers do not count; of this rank's share with sequence parallelism.
        next_ids_D1T: int64, the next token, the one after it, ..., as deep as tokens are predicted.
    """

    spans: tuple[Span, ...] = ()
    positions_T: Tensor | None = None
    order_R: Tensor | None = None
    rotary_T1D: tuple[Tensor, Tensor] | None = None
    padding_1T: Tensor | None = None
    next_ids_D1T: Tensor | None = None


@dataclass(frozen=True)
class Target:
    """What is to be predicted at every token.

    Attributes:
        labels_1T: int64, the next token; for multi-token prediction layers the one after it, and so on.
        loss_mask_1T: float32, 1 where it is trained on.
    """

    labels_1T: Tensor
    loss_mask_1T: Tensor


def row_layout(
    boundaries: np.ndarray, rank: int, ways: int, device: torch.device, positions_R: np.ndarray | None = None
) -> RowLayout:
    """The layout of a row whose documents begin at ``boundaries``.

    Args:
        boundaries: int, from 0 to R.
        rank, ways: of context parallelism. The row is cut into ``2 * ways`` chunks; a rank has one from the
            front and its mirror from the back, so that all have about the same attention to compute.
        positions_R: of each token; by default counted from the beginning of its document.
    """
    size = int(boundaries[-1])
    if positions_R is None:
        positions_R = np.arange(size) - np.repeat(boundaries[:-1], np.diff(boundaries))
    own = context_tokens(size, rank, ways)
    cu_seqlens = torch.from_numpy(boundaries.astype(np.int32)).to(device)
    longest = int(np.diff(boundaries).max())
    order = None
    if ways > 1:
        gathered = np.concatenate([context_tokens(size, other, ways) for other in range(ways)])
        order = torch.from_numpy(np.argsort(gathered)).to(device)
    return RowLayout(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        spans=tuple(_spans(own, boundaries)),
        positions_T=torch.from_numpy(positions_R[own]).to(device),
        order_R=order,
    )


def context_tokens(size: int, rank: int, ways: int) -> np.ndarray:
    """Places in a row of the tokens that a context-parallel rank has, in its order, int64."""
    if ways == 1:
        return np.arange(size)
    assert size % (2 * ways) == 0, "the config sees to it"
    chunks = np.arange(size).reshape(2 * ways, -1)
    return np.concatenate([chunks[rank], chunks[2 * ways - 1 - rank]])


def _spans(own: np.ndarray, boundaries: np.ndarray) -> list[Span]:
    """Cut where the row's order or the document changes."""
    document = np.searchsorted(boundaries, own, side="right") - 1
    cut = np.flatnonzero((np.diff(own) != 1) | (np.diff(document) != 0)) + 1
    starts: Sequence[int] = [0, *cut.tolist()]
    stops: Sequence[int] = [*cut.tolist(), len(own)]
    return [
        Span(start, stop, int(boundaries[document[start]]), int(own[stop - 1]) + 1)
        for start, stop in zip(starts, stops)
    ]


def shifted(values_R: np.ndarray, boundaries: np.ndarray) -> np.ndarray:
    """Each document moved up by one place; its last place gets 0."""
    moved = np.empty_like(values_R)
    moved[:-1] = values_R[1:]
    moved[boundaries[1:] - 1] = 0
    return moved
