"""Which rows every step of a run trains on: phase after phase, known from the start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron_klong.config import DataConfig
from megatron_klong.data.dataset import SourceWindows
from megatron_klong.data.mixture import Mixture
from megatron_klong.data.rows import PackedRow, PackedRows, SampleName, balanced


@dataclass(frozen=True)
class Phase:
    """A stretch of steps with one mix.

    Attributes:
        first_step: counted from 1 over the whole run.
        steps: how many.
        tokens: that they train on, about.
    """

    name: str
    rows: PackedRows
    first_step: int
    steps: int
    tokens: int

    @property
    def last_step(self) -> int:
        """Counted like ``first_step``."""
        return self.first_step + self.steps - 1


class Curriculum:
    """The phases of a run. What a step trains on follows from its number: a run resumes by that alone.

    Args:
        batch_rows: rows of a step. The last step of a phase that ends with its data is filled up with empty
            ones, which change nothing.
    """

    def __init__(
        self, config: DataConfig, sources: Mapping[str, SourceWindows], batch_rows: int, seed: int
    ) -> None:
        self._batch_rows = batch_rows
        phases: list[Phase] = []
        first = 1
        for number, (name, settings) in enumerate(config.phases.items()):
            mixes = config.mixes(name)
            train = {source: sources[source].train for source in mixes}
            phase_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
            mix = Mixture.by_weights if settings.steps else Mixture.by_epochs
            mixture = mix(train, mixes, phase_seed)
            rows = PackedRows(mixture, config.row_length, phase_seed, passes=mixture.passes)
            steps = settings.steps or -(-rows.total // batch_rows)
            passes = mixture.passes or steps * batch_rows / rows.rows_per_epoch
            phases.append(Phase(name, rows, first, steps, round(passes * mixture.tokens)))
            first += steps
        self.phases = tuple(phases)
        self.steps = first - 1
        """Of all phases."""

    def phase(self, step: int) -> Phase:
        """The phase of a step, counted from 1."""
        return next(phase for phase in self.phases if step <= phase.last_step)

    def batch(self, step: int, rank: int, ways: int) -> list[PackedRow]:
        """The rows of a step that data-parallel rank ``rank`` of ``ways`` takes, alike in cost for all."""
        rows, first = self._rows(step)
        costs = [rows.cost(first + row) for row in range(self._batch_rows)]
        return [rows.row(first + row) for row in balanced(costs, ways)[rank]]

    def samples(self, step: int) -> list[SampleName]:
        """All samples of a step."""
        rows, first = self._rows(step)
        return [name for row in range(self._batch_rows) for name in rows.names(first + row)]

    def fingerprint(self, step: int) -> str:
        """Of the samples of a step: equal for two steps that train on the same."""
        return hashlib.sha256(json.dumps(self.samples(step)).encode()).hexdigest()[:16]

    def _rows(self, step: int) -> tuple[PackedRows, int]:
        phase = self.phase(step)
        return phase.rows, (step - phase.first_step) * self._batch_rows
