"""Packed rows by number: the position in the data is the row number, nothing else.

The plan of an epoch depends on the data, the row length and the seed, never on the parallel
layout; so a run resumes at any layout by remembering one number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_klong.data.packing import pack_rows
from megatron_klong.data.windows import TrainingSample


class SampleSource(Protocol):
    """What can be packed."""

    lengths: np.ndarray

    def sample(self, index: int) -> TrainingSample: ...


@dataclass(frozen=True)
class PackedRow:
    """One micro-batch: samples behind one another, padding at the end as a document of its own.

    Attributes:
        tokens_R: int64, inputs.
        labels_R: int64, the next token of the same sample.
        loss_mask_R: float32, 1 where the label is trained on.
        cu_seqlens: int32, document boundaries from 0 to R.
        samples: trajectory and window numbers of the samples, in order.
        sample_tokens: tokens of all samples, padding excluded.
        units: what the row counts in the mean over a batch; its trained tokens, unless an objective is
            a mean over something else.
    """

    tokens_R: np.ndarray
    labels_R: np.ndarray
    loss_mask_R: np.ndarray
    cu_seqlens: np.ndarray
    samples: tuple[tuple[int, int], ...]
    sample_tokens: int
    units: int


def fill_row(samples: list[TrainingSample], row_tokens: int) -> PackedRow:
    """Put samples behind one another and shift them into inputs and labels.

    The last token of a sample predicts nothing, so its place carries no loss, whatever follows.
    """
    tokens = np.zeros(row_tokens, dtype=np.int64)
    labels = np.zeros(row_tokens, dtype=np.int64)
    mask = np.zeros(row_tokens, dtype=np.float32)
    boundaries = [0]
    for sample in samples:
        start, length = boundaries[-1], len(sample.tokens_T)
        tokens[start : start + length] = sample.tokens_T
        labels[start : start + length - 1] = sample.tokens_T[1:]
        mask[start : start + length - 1] = sample.loss_mask_T[1:]
        boundaries.append(start + length)
    sample_tokens = boundaries[-1]
    if sample_tokens < row_tokens:
        boundaries.append(row_tokens)
    names = tuple((sample.trajectory, sample.window) for sample in samples)
    return PackedRow(
        tokens, labels, mask, np.array(boundaries, dtype=np.int32), names, sample_tokens, int(mask.sum())
    )


class PackedRows:
    """An endless sequence of rows over a source: epoch after epoch, each in an order of its own."""

    def __init__(self, source: SampleSource, row_tokens: int, seed: int) -> None:
        self._source = source
        self.row_tokens = row_tokens
        self._seed = seed
        self._ends: list[int] = []
        self._plan: tuple[int, list[np.ndarray]] = (-1, [])

    def row(self, position: int) -> PackedRow:
        """Row ``position`` of the whole run, counted from 0."""
        epoch = self.epoch(position)
        start = self._ends[epoch - 1] if epoch else 0
        indices = self._epoch_plan(epoch)[position - start]
        return fill_row([self._source.sample(int(index)) for index in indices], self.row_tokens)

    def epoch(self, position: int) -> int:
        """The epoch that a row belongs to, from 0."""
        while not self._ends or self._ends[-1] <= position:
            before = self._ends[-1] if self._ends else 0
            self._ends.append(before + len(self._epoch_plan(len(self._ends))))
        return int(np.searchsorted(self._ends, position, side="right"))

    def _epoch_plan(self, epoch: int) -> list[np.ndarray]:
        if self._plan[0] != epoch:
            seed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
            self._plan = (epoch, pack_rows(self._source.lengths, self.row_tokens, seed))
        return self._plan[1]

    @property
    def rows_per_epoch(self) -> int:
        """Rows of the first epoch; later ones differ by little."""
        return len(self._epoch_plan(0))
