"""The state of Megatron's distributed optimizer in checkpoints: every rank writes and reads what it owns.

Of each weight that a rank holds, it owns the optimizer's state of a run of numbers, in row-major order; its
data-parallel copies own the others. In a checkpoint a state has the weight's shape and its place in the whole
model, under the keys of Megatron's ``fully_reshardable`` format. A run is no box, but a few boxes together
are one; those are what a rank writes. So nothing is gathered, nobody holds more than its own, and any other
layout reads the boxes that it owns.

Megatron-Core 0.16 itself gathers that format on one rank of the copies, which then writes all of it; its
formats without gathering are refused, or are bound to a layout.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from torch import Tensor
from torch.optim import Optimizer

from megatron_klong.training.moments import MOMENTS

_WEIGHT = "param"
"""What a checkpoint calls the fp32 weights that are updated."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes."""


def sharded_optimizer(optimizer: Any, model: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds of the optimizer; loading writes into the tensors that are given here.

    Args:
        optimizer: Megatron's, with its moments allocated.
        model: sharded state of the model (``model_checkpoint.sharded_model``).
    """
    places = {id(entry.data): entry for entry in nested_values(dict(model)) if _is_weight(entry)}
    pieces: list[ShardedTensor] = []
    for part in optimizer.chained_optimizers:
        for weight, start, own in _owned(part):
            states = {_WEIGHT: own} | {name: part.optimizer.state[own][name] for name in MOMENTS}
            for place in _elementary(places[id(weight)]):
                pieces += _boxes_of(place, weight, start, states)
    steps = max((_steps(part.optimizer) for part in optimizer.chained_optimizers), default=0)
    return {"steps": steps, "state": {str(number): piece for number, piece in enumerate(pieces)}}


def put_optimizer(optimizer: Any, asked: Mapping[str, Any], loaded: Mapping[str, Any]) -> None:
    """Take over what was loaded for :func:`sharded_optimizer`.

    Args:
        asked: what that gave.
    """
    for number, piece in asked["state"].items():
        if loaded["state"][number].data_ptr() != piece.data.data_ptr():
            piece.data.copy_(loaded["state"][number])
    for part in optimizer.chained_optimizers:
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state["step"] = torch.tensor(float(loaded["steps"]))
        else:  # fused ones count in their groups
            for group in part.optimizer.param_groups:
                group["step"] = loaded["steps"]


def owned_tensors(optimizer: Any) -> Iterator[Tensor]:
    """Everything of the optimizer that a step changes; its moments are allocated."""
    for part in optimizer.chained_optimizers:
        for _, _, own in _owned(part):
            yield own
            yield from (part.optimizer.state[own][name] for name in MOMENTS)


def boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """Boxes of a tensor that together have its elements from ``start`` to ``stop`` in row-major order, in
    that order, each of them a contiguous run."""
    if start >= stop:
        return []
    if len(shape) == 1:
        return [((start,), (stop - start,))]
    row = prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows
    if first > last:  # both ends in one row
        return _within(shape, last, start, stop)
    before = _within(shape, first - 1, start, first * row)
    whole = [((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]))] if first < last else []
    return [*before, *whole, *_within(shape, last, last * row, stop)]


def _within(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    """The same, within one row of the first dimension."""
    size = prod(shape[1:])
    inner = boxes(shape[1:], start - row * size, stop - row * size)
    return [((row, *offsets), (1, *sizes)) for offsets, sizes in inner]


def _owned(part: Any) -> Iterator[tuple[Tensor, int, Tensor]]:
    """Of each weight: where in it the run begins that this rank owns, and the fp32 numbers of it, ``[n]``."""
    for buffers in part.gbuf_ranges:
        for buckets in buffers.values():
            for bucket in buckets:
                for weight, ranges in bucket["param_map"].items():
                    group, place = part.model_param_group_index_map[weight]
                    yield weight, ranges["param"].start, part.optimizer.param_groups[group]["params"][place]


def _is_weight(entry: Any) -> bool:
    return isinstance(entry, (ShardedTensor, ShardedTensorFactory)) and isinstance(entry.data, Tensor)


def _elementary(entry: ShardedTensor | ShardedTensorFactory) -> list[ShardedTensor]:
    """A factory cuts a weight into what the checkpoint has (gate and up, which are one weight on a rank)."""
    return [entry] if isinstance(entry, ShardedTensor) else list(nested_values({"cut": entry.build()}))


def _boxes_of(
    place: ShardedTensor, weight: Tensor, start: int, states: Mapping[str, Tensor]
) -> Iterator[ShardedTensor]:
    """The part of states that lies in a part of a weight.

    Args:
        place: a part of this rank's weight, contiguous in it.
        start: of the run in the weight.
        states: by name, ``[n]``.
    """
    assert place.data is not None and place.data.is_contiguous()
    behind = place.data.storage_offset() - weight.storage_offset()
    count = next(iter(states.values())).numel()
    first, last = max(start, behind), min(start + count, behind + place.data.numel())
    shape = (1,) * place.prepend_axis_num + tuple(place.local_shape)
    done = first - start
    for offsets, sizes in boxes(shape, first - behind, last - behind):
        for name, state in states.items():
            yield ShardedTensor(
                key=f"optimizer.state.{name}.{place.key}",
                data=state.detach()[done : done + prod(sizes)].view(sizes),
                dtype=state.dtype,
                local_shape=sizes,
                global_shape=tuple(place.global_shape),
                global_offset=tuple(a + b for a, b in zip(place.global_offset, offsets, strict=True)),
                axis_fragmentations=None,
                # Copies on tensor-parallel ranks and of the embedding stay copies; data-parallel ones differ.
                replica_id=(*place.replica_id[:2], 0),
            )
        done += prod(sizes)


def _steps(adam: Optimizer) -> int:
    """Updates so far."""
    of_weights = [int(state["step"]) for state in adam.state.values() if "step" in state]
    return max([*of_weights, *(int(group.get("step", 0)) for group in adam.param_groups)], default=0)
