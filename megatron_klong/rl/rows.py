"""Batches to packed rows: the same rows at any layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from megatron_klong.config import ObjectiveConfig
from megatron_klong.data.packing import pack_rows
from megatron_klong.data.rows import fill_row
from megatron_klong.rl.batches import Batch
from megatron_klong.rl.experience import Segment
from megatron_klong.rl.objective import ExperienceRow


def experience_rows(
    batch: Batch, row_tokens: int, config: ObjectiveConfig, multiple: int, seed: int
) -> list[list[ExperienceRow]]:
    """The rows of each optimizer step on a batch.

    Args:
        row_tokens: length of every row.
        multiple: each step has a multiple of it, filled up with empty rows: so many that all data-parallel
            ranks and interleaved stages have the same. Filling up changes nothing in loss or gradients, so
            neither does the layout.
        seed: of the packing.

    Returns:
        ``config.updates`` lists of equally many rows.
    """
    segments = batch.segments
    lengths = np.array([len(segment.sample.tokens_T) for segment in segments], dtype=np.int64)
    plan = pack_rows(lengths, row_tokens, seed)
    weights, units = _weights(segments, config)
    rows = [
        _row([(segments[n], weights[n], units[n]) for n in indices], batch.header.advantages, row_tokens)
        for indices in plan
    ]
    parts = [rows[update :: config.updates] for update in range(config.updates)]
    each = -(-max(map(len, parts)) // multiple) * multiple
    return [part + [_row([], (), row_tokens)] * (each - len(part)) for part in parts]


def _weights(segments: Sequence[Segment], config: ObjectiveConfig) -> tuple[list[float], list[int]]:
    """By segment: what each of its tokens counts, and how many units it is."""
    sizes = [len(segment.log_probs) for segment in segments]
    if config.normalise == "window":
        return [1 / size for size in sizes], [1] * len(sizes)
    if config.normalise == "token":
        return [1.0] * len(sizes), sizes
    of_rollout: Counter[int] = Counter()
    for segment, size in zip(segments, sizes):
        of_rollout[segment.sample.trajectory] += size
    weights = [1 / of_rollout[segment.sample.trajectory] for segment in segments]
    return weights, [int(segment.sample.window == 0) for segment in segments]


def _row(
    parts: list[tuple[Segment, float, int]], advantages: Sequence[float], row_tokens: int
) -> ExperienceRow:
    filled = fill_row([segment.sample for segment, _, _ in parts], row_tokens)
    weight, advantage, engine = (np.zeros(row_tokens, dtype=np.float32) for _ in range(3))
    for place, (segment, each, _) in enumerate(parts):
        # A label stands one place before its token.
        start, stop = filled.cu_seqlens[place : place + 2]
        places = start + np.flatnonzero(filled.loss_mask_R[start:stop])
        weight[places] = each
        advantage[places] = advantages[segment.sample.trajectory]
        engine[places] = segment.log_probs
    nothing = np.zeros(row_tokens, dtype=np.float32)
    return ExperienceRow(
        **{**vars(filled), "units": sum(units for _, _, units in parts)}, weights_R=weight,
        advantages_R=advantage, engine_R=engine, old_R=nothing, reference_R=nothing,
    )  # fmt: skip
