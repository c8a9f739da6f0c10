"""Windows into rows of equal length: best fit, seeded, the same for every parallel layout."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from fractions import Fraction

import numpy as np

_LARGEST_K = 20


def pack_rows(lengths: np.ndarray, row_tokens: int, seed: int) -> list[np.ndarray]:
    """Best-fit decreasing: the indices of ``lengths`` in each row, rows in a seeded order.

    The seed breaks ties among equal lengths and orders rows, and windows within a row; so another
    seed gives other rows.

    Raises:
        ValueError: a length exceeds ``row_tokens``.
    """
    if len(lengths) and int(lengths.max()) > row_tokens:
        raise ValueError(f"data.row_tokens={row_tokens} is less than a sample of {int(lengths.max())}")
    random = np.random.default_rng(seed)
    shuffled = random.permutation(len(lengths))
    order = shuffled[np.argsort(-lengths[shuffled], kind="stable")]
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for sample in order.tolist():
        length = int(lengths[sample])
        place = bisect_left(free, (length, -1))
        if place == len(free):
            room, row = row_tokens, len(rows)
            rows.append([])
        else:
            room, row = free.pop(place)
        rows[row].append(sample)
        if room > length:
            insort(free, (room - length, row))
    return [random.permutation(rows[row]) for row in random.permutation(len(rows)).tolist()]


def minimum_rows(lengths: np.ndarray, row_tokens: int) -> int:
    """A lower bound on the rows that any packing needs: the larger of two.

    Martello and Toth's L2, which covers L1: for every threshold k, samples over R - k share a row with none
    of size k or more; those over R / 2 share with none of their kind; the rest of size k or more fills what
    these leave. And Fekete and Schepers' dual feasible functions u_k, by which a sample counts for as many
    k-ths of a row as its size has (k+1)-ths: of samples over a fifth of a row, no five share one.
    """
    if not len(lengths):
        return 0
    sizes = lengths.astype(np.int64)
    return max(_l2(sizes, row_tokens), _dual_feasible(sizes, row_tokens))


def _dual_feasible(sizes: np.ndarray, row_tokens: int) -> int:
    best = 0
    for k in range(1, _LARGEST_K + 1):
        parts, rest = np.divmod((k + 1) * sizes, row_tokens)
        # A size of exactly so many (k+1)-ths counts as it is: x = parts / (k + 1).
        exact = parts[rest == 0].sum()
        best = max(best, math.ceil(Fraction(int(parts[rest > 0].sum()), k) + Fraction(int(exact), k + 1)))
    return best


def _l2(lengths: np.ndarray, row_tokens: int) -> int:
    sizes = np.sort(lengths)
    total = np.concatenate([[0], np.cumsum(sizes)])
    half = int(np.searchsorted(sizes, row_tokens // 2, side="right"))  # sizes[half:] exceed R / 2
    k = np.unique(np.concatenate([[0], sizes[:half]]))
    large = np.searchsorted(sizes, row_tokens - k, side="right")  # sizes[large:] exceed R - k
    small = np.searchsorted(sizes, k, side="left")  # sizes[:small] are below k
    room = (large - half) * row_tokens - (total[large] - total[half])
    rest = np.maximum(total[half] - total[small] - room, 0)
    return int((len(sizes) - half + -(-rest // row_tokens)).max())
