"""Means of grades with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
         2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
         2.045, 2.042)  # fmt: skip
"""Student's t for a two-sided 95% interval, by degrees of freedom from 1."""

_Z_95 = 1.959964


class Mean(BaseModel):
    """A mean with the half-width of its 95% interval (Student's t).

    Attributes:
        half_width: None for a single value.
    """

    model_config = ConfigDict(frozen=True)

    mean: float
    half_width: float | None
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + ("" if self.half_width is None else f" +- {self.half_width:.3f}")


def mean_of(values: Sequence[float]) -> Mean:
    """Mean and interval of independent values, such as one grade for each task."""
    count = len(values)
    assert count, "a mean of nothing"
    mean = math.fsum(values) / count
    if count == 1:
        return Mean(mean=mean, half_width=None, count=1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Mean(mean=mean, half_width=student_t(count - 1) * math.sqrt(variance / count), count=count)


def student_t(freedom: int) -> float:
    """Student's t for a two-sided 95% interval.

    Beyond the table by Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), there right to 1e-4.
    """
    if freedom <= len(_T_95):
        return _T_95[freedom - 1]
    z, n = _Z_95, float(freedom)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / n + second / n**2
