"""Packed rows by number: the position in the data is the row number, nothing else.

The plan of an epoch depends on the data, the row length and the seed, never on the parallel
layout; so a run resumes at any layout by remembering one number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Protocol

import numpy as np

from megatron_klong.data.packing import pack_rows

SampleName = tuple[str | int, int]
"""What its trajectory is called, and which of its windows it is."""


class Packable(Protocol):
    """A sample that can be written into a row."""

    @property
    def length(self) -> int:
        """In tokens."""
        ...

    @property
    def name(self) -> SampleName: ...

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        """Write tokens (int64) and loss mask (bool) into arrays of its length."""
        ...


class Samples(Protocol):
    """What can be packed."""

    @property
    def lengths(self) -> np.ndarray:
        """Of each sample, in tokens, int64."""
        ...

    def packable(self, index: int) -> Packable: ...

    def name(self, index: int) -> SampleName:
        """Of sample ``index``, without making it."""
        ...


class SampleSource(Protocol):
    """Samples for epoch after epoch."""

    def epoch(self, number: int) -> Samples:
        """The samples of an epoch, from 0; the same each time it is asked for."""
        ...


@dataclass(frozen=True)
class _Epoch:
    """One epoch: its samples, and the indices of those in each row."""

    samples: Samples
    rows: list[np.ndarray]


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: samples behind one another, padding at the end as a document of its own.

    Attributes:
        tokens_R: int64, inputs.
        labels_R: int64, the next token of the same sample.
        loss_mask_R: float32, 1 where the label is trained on.
        cu_seqlens: int32, document boundaries from 0 to R.
        samples: names of the samples, in order.
        sample_tokens: tokens of all samples, padding excluded.
        units: what the row counts in the mean over a batch; its trained tokens, unless an objective is
            a mean over something else.
    """

    tokens_R: np.ndarray
    labels_R: np.ndarray
    loss_mask_R: np.ndarray
    cu_seqlens: np.ndarray
    samples: tuple[SampleName, ...]
    sample_tokens: int
    units: int

    @property
    def attended_pairs(self) -> int:
        """Of a token of a sample and one that it sees, itself included."""
        lengths = np.diff(self.cu_seqlens[: len(self.samples) + 1].astype(np.int64))
        return int((lengths * (lengths + 1) // 2).sum())


def fill_row(samples: Sequence[Packable], row_tokens: int) -> PackedRow:
    """Put samples behind one another and shift them into inputs and labels.

    The last token of a sample predicts nothing, so its place carries no loss, whatever follows.
    """
    boundaries = [0, *accumulate(sample.length for sample in samples)]
    used = boundaries[-1]
    tokens, labels = np.empty(row_tokens, dtype=np.int64), np.empty(row_tokens, dtype=np.int64)
    mask, trained = np.empty(row_tokens, dtype=np.float32), np.empty(used, dtype=bool)
    for sample, start, stop in zip(samples, boundaries, boundaries[1:]):
        sample.write(tokens[start:stop], trained[start:stop])
    tokens[used:] = labels[max(used - 1, 0) :] = mask[max(used - 1, 0) :] = 0
    if used:
        labels[: used - 1], mask[: used - 1] = tokens[1:used], trained[1:]
        ends = np.array(boundaries[1:]) - 1
        labels[ends] = mask[ends] = 0
    names = tuple(sample.name for sample in samples)
    if used < row_tokens:
        boundaries.append(row_tokens)
    return PackedRow(tokens, labels, mask, np.array(boundaries, dtype=np.int32), names, used, int(mask.sum()))


def balanced(costs: Sequence[float], ways: int) -> list[list[int]]:
    """Which rows of a batch each data-parallel rank takes: equally many, and alike in cost at every step.

    Ranks meet in every micro-batch (expert parallelism) and at the end. So rows of nearly equal cost are
    taken at one time, the dearest of them by the rank that has done least.

    Args:
        costs: of each row; a multiple of ``ways``.

    Returns:
        The numbers of the rows of each rank, in the order in which it takes them.
    """
    order = sorted(range(len(costs)), key=lambda row: (-costs[row], row))
    taken: list[list[int]] = [[] for _ in range(ways)]
    done = [0.0] * ways
    for step in range(0, len(order), ways):
        for rank, row in zip(sorted(range(ways), key=lambda rank: (done[rank], rank)), order[step:]):
            taken[rank].append(row)
            done[rank] += costs[row]
    return taken


class PackedRows:
    """A sequence of rows over a source: epoch after epoch, each in an order of its own.

    Args:
        passes: epochs that there are; rows behind them are empty. None for no end.
    """

    def __init__(
        self, source: SampleSource, row_tokens: int, seed: int, *, passes: int | None = None
    ) -> None:
        self._source = source
        self.row_tokens = row_tokens
        self._seed = seed
        self._passes = passes
        self._ends: list[int] = []
        self._plans: dict[int, _Epoch] = {}

    @property
    def empty(self) -> PackedRow:
        """A row of padding."""
        return fill_row([], self.row_tokens)

    def row(self, position: int) -> PackedRow:
        """Row ``position`` of the whole run, counted from 0."""
        if self._is_behind(position):
            return self.empty
        samples, indices = self._row(position)
        return fill_row([samples.packable(index) for index in indices.tolist()], self.row_tokens)

    def cost(self, position: int) -> float:
        """Of the attention of a row: pairs of tokens that see each other."""
        if self._is_behind(position):
            return 0.0
        samples, indices = self._row(position)
        return float((samples.lengths[indices].astype(np.float64) ** 2).sum())

    def names(self, position: int) -> tuple[SampleName, ...]:
        """Of the samples of a row, in order."""
        if self._is_behind(position):
            return ()
        samples, indices = self._row(position)
        return tuple(samples.name(index) for index in indices.tolist())

    @cached_property
    def total(self) -> int:
        """Rows of all passes."""
        assert self._passes is not None, "rows without end"
        while len(self._ends) < self._passes:
            self._plan_next()
        return self._ends[-1]

    def _is_behind(self, position: int) -> bool:
        return self._passes is not None and position >= self.total

    def _row(self, position: int) -> tuple[Samples, np.ndarray]:
        epoch = self.epoch(position)
        start = self._ends[epoch - 1] if epoch else 0
        plan = self._plan(epoch)
        return plan.samples, plan.rows[position - start]

    def epoch(self, position: int) -> int:
        """The epoch that a row belongs to, from 0."""
        while not self._ends or self._ends[-1] <= position:
            self._plan_next()
        return int(np.searchsorted(self._ends, position, side="right"))

    def _plan_next(self) -> None:
        before = self._ends[-1] if self._ends else 0
        self._ends.append(before + len(self._plan(len(self._ends)).rows))

    def _plan(self, epoch: int) -> _Epoch:
        if epoch not in self._plans:
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            samples = self._source.epoch(epoch)
            plan = _Epoch(samples, pack_rows(samples.lengths, self.row_tokens, seed))
            # A batch may lie in two epochs: both stay, and no other.
            self._plans = {n: each for n, each in self._plans.items() if abs(n - epoch) == 1} | {epoch: plan}
        return self._plans[epoch]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; later ones differ by little."""
        return len(self._plan(0).rows)
