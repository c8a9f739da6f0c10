"""How far two implementations are apart on the same tokens. No torch here."""

from __future__ import annotations

import math
from collections.abc import Sequence


def differences(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Distance of log-probs, token by token: absolute up to a magnitude of 1, relative beyond.

    Floating point keeps digits, not decimals: at a log-prob of -14 fp32 sums are off by 1e-4 where
    at -1 they are off by 1e-5.
    """
    return [abs(a - b) / max(1.0, abs(a), abs(b)) for a, b in zip(ours, theirs, strict=True)]


def largest(apart: Sequence[float]) -> float:
    """The largest difference; NaN where any is NaN, which Python's ``max`` would pass over."""
    return math.nan if any(math.isnan(each) for each in apart) else max(apart)
