"""Records of trajectories as tokens: what a store holds, and what a rollout becomes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TurnLabel:
    """What the window rule needs of a turn beside its token counts.

    Attributes:
        context_only: never trained.
        tools: the names it calls, in order.
    """

    context_only: bool
    tools: tuple[str, ...]


@dataclass(frozen=True)
class TrajectoryLabel:
    """One line of the trajectory list."""

    id: str
    task_id: str | None
    reward: float | None
    marked_turns: int | None
    turns: tuple[TurnLabel, ...]


@dataclass(frozen=True)
class TokenBlocks:
    """The tokens of a trajectory.

    Attributes:
        tokens: of all blocks, in order, 1-D.
        mask: loss mask, uint8, the same length.
        bounds: where blocks begin, int64, one more than blocks: initial, then action and answer
            of every turn.
    """

    tokens: np.ndarray
    mask: np.ndarray
    bounds: np.ndarray


@dataclass(frozen=True)
class StoredTrajectory(TokenBlocks):
    """One trajectory of a store."""

    label: TrajectoryLabel
