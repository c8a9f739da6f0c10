"""Which layers a pipeline stage has. Imports no torch: it is asked before a start."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=4096)  # a search asks the same of many layouts
def stage_layers(layers: int, stages: int) -> tuple[int, ...]:
    """Decoder layers of each pipeline stage, in order.

    Where the stages do not divide the layers, the embedding and the head count as a layer each, so that the
    first and the last stage have fewer: 46 layers on 4 stages are 11, 12, 12 and 11. Each has one at least.

    Args:
        layers: of the decoder, at least as many as there are stages.
        stages: of all pipeline ranks.
    """
    assert 1 <= stages <= layers
    even, rest = divmod(layers, stages)
    if not rest:
        return (even,) * stages
    held = [1] * stages
    beside = [int(stage == 0) + int(stage == stages - 1) for stage in range(stages)]
    for _ in range(layers - stages):
        # The middle first: what does not divide is not for those that have the embedding or the head.
        least = min(range(stages), key=lambda stage: (held[stage] + beside[stage], beside[stage], stage))
        held[least] += 1
    return tuple(held)
