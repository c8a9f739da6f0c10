"""Group-relative advantages (design, RL objective)."""

from __future__ import annotations

import math
from collections.abc import Sequence


def group_advantages(scores: Sequence[float | None], *, divide_by_std: bool = False) -> list[float] | None:
    """A_j = Q_j - mean over the group's graded rollouts; over rollouts, never over windows.

    Args:
        scores: of each rollout of a group; None for one that infrastructure kept from a grade.
        divide_by_std: divide by the standard deviation of the graded scores.

    Returns:
        Advantages of the graded rollouts, in order; None for a group with fewer than two of them, which
        has no baseline and is dropped.
    """
    graded = [score for score in scores if score is not None]
    if len(graded) < 2:
        return None
    mean = math.fsum(graded) / len(graded)
    advantages = [score - mean for score in graded]
    if not divide_by_std:
        return advantages
    deviation = math.sqrt(math.fsum(a * a for a in advantages) / len(graded))
    return [a / deviation if deviation else 0.0 for a in advantages]
