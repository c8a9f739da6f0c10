"""Records of trajectories as tokens: what a store holds, and what a rollout becomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

TRAINED = 0x80
"""The bit of a token's mark that says it carries loss; the others are its
:class:`~megatron_klong.trajectory.render.TokenKind`."""


@dataclass(frozen=True)
class TrajectoryLabel:
    """One line of the trajectory list."""

    id: str
    task_id: str | None
    reward: float | None
    marked_turns: int | None


@dataclass(frozen=True)
class TokenBlocks:
    """The tokens of a trajectory.

    Attributes:
        tokens: of all blocks, in order, 1-D.
        marks: what each is a part of, and whether it carries loss (:data:`TRAINED`), uint8.
        bounds: where blocks begin, int64, one more than blocks: initial, then action and answer
            of every turn.
    """

    tokens: np.ndarray
    marks: np.ndarray
    bounds: np.ndarray

    def trained(self, start: int, stop: int) -> np.ndarray:
        """Which tokens of a stretch carry loss, bool."""
        return self.marks[start:stop] >= TRAINED


@dataclass(frozen=True)
class StoredTrajectory(TokenBlocks):
    """One trajectory of a store."""

    label: TrajectoryLabel
