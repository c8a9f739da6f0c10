"""What is under way on a pipeline rank, by Megatron's schedules: 1F1B, and interleaved 1F1B."""

from __future__ import annotations

from functools import lru_cache

Moment = tuple[int, tuple[int, ...]]
"""When a backward pass begins: which of the rank's stages it goes through, and how many forward passes of
each stage are kept at that time, its own among them."""


@lru_cache(maxsize=4096)  # a search asks the same of many layouts
def backward_moments(pipeline: int, virtual: int, micro_batches: int, rank: int) -> tuple[Moment, ...]:
    """One of each kind, in the order in which they come first.

    Args:
        pipeline, virtual: ranks, and stages of each.
        micro_batches: of a step; with interleaved stages a multiple of the pipeline ranks.
        rank: its place in the pipeline.
    """
    total = micro_batches * virtual
    ahead = pipeline - rank - 1
    if virtual > 1:
        ahead = 2 * ahead + (virtual - 1) * pipeline
    kept, forward = [0] * virtual, 0
    seen: dict[Moment, None] = {}
    for backward in range(min(total, 2 * pipeline * virtual)):  # then it repeats
        while forward < min(backward + ahead + 1, total):
            kept[_stage(forward, pipeline, virtual)] += 1
            forward += 1
        stage = virtual - 1 - _stage(backward, pipeline, virtual)
        seen.setdefault((stage, tuple(kept)))
        kept[stage] -= 1
    return tuple(seen)


def _stage(place: int, pipeline: int, virtual: int) -> int:
    """Of the forward pass at a place of the order: as many micro-batches as there are ranks go through a
    stage, then through the next one."""
    return place // pipeline % virtual
