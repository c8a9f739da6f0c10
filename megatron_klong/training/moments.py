"""Adam's moments: made before a first step, and kept in host memory if they are to be.

In host memory, a device has those of a few parameters at a time, while they are updated: it saves two thirds
of what the optimizer of a bf16 model needs. The update is the optimizer's own, on the device, so the weights
are those of a run without it, bit for bit; each step sends the moments there and back.

Megatron-Core 0.16 has two such means. ``optimizer_cpu_offload`` updates on the CPU, in a way that a machine
without GPUs cannot run; ``offload_to_cpu`` brings everything back for a step, which is when it is most.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from megatron_klong.planner.memory import OFFLOADED_PIECE_BYTES
from megatron_klong.training.rank_entry import RankError

MOMENTS = ("exp_avg", "exp_avg_sq")
"""Their names in the state of torch's AdamW, and of the fused ones of Transformer Engine and Apex."""

_BLOCK_BYTES = 1 << 30
_ALIGNMENT = 64


def allocate_moments(optimizer: Any) -> None:
    """Give Megatron's optimizer the state it has after a first step; what it has already stays as it is."""
    _allocate(optimizer, torch.zeros_like)


def keep_moments_on_host(optimizer: Any, piece_bytes: int = OFFLOADED_PIECE_BYTES) -> None:
    """Allocate the moments in host memory, and step so that they stay there.

    The inner optimizers' ``step`` is replaced, in this place alone.

    Args:
        optimizer: Megatron's, which has taken no step.
        piece_bytes: of moments on the device at a time, unless one parameter has more.

    Raises:
        RankError: Apex's Adam, which has lists of its own beside the groups that are stepped.
    """
    if any(hasattr(part.optimizer, "param_groups_master") for part in optimizer.chained_optimizers):
        raise RankError(
            "optimizer.offload=true needs Transformer Engine's Adam, or torch's, and this is Apex's; install "
            "transformer-engine, or set it to false"
        )
    weights = [weight for part in optimizer.chained_optimizers for weight in _weights(part.optimizer)]
    _allocate(optimizer, _HostBlocks(weight for weight in weights for _ in MOMENTS).zeros_like)
    for part in optimizer.chained_optimizers:
        part.optimizer.step = _PieceByPiece(part.optimizer, piece_bytes).step


def _allocate(optimizer: Any, zeros_like: Callable[[Tensor], Tensor]) -> None:
    for part in optimizer.chained_optimizers:
        for weight in _weights(part.optimizer):
            state = part.optimizer.state[weight]
            for name in MOMENTS:
                if name not in state:
                    state[name] = zeros_like(weight)
            if isinstance(part.optimizer, torch.optim.AdamW):
                state.setdefault("step", torch.tensor(0.0))


def _weights(adam: Optimizer) -> list[Tensor]:
    return [weight for group in adam.param_groups for weight in group["params"]]


class _PieceByPiece:
    """Steps an optimizer whose moments are in host memory."""

    def __init__(self, adam: Optimizer, piece_bytes: int) -> None:
        self._adam = adam
        self._step = adam.step
        self._piece_bytes = piece_bytes

    @torch.no_grad()
    def step(self) -> None:
        groups = self._adam.param_groups
        try:
            for group in groups:
                options = {key: value for key, value in group.items() if key != "params"}
                for piece in self._pieces(group["params"]):
                    part = {**options, "params": piece}
                    self._adam.param_groups = [part]
                    self._update(piece)
                    # Fused optimizers count a group's steps in it: each piece from the same number on.
                    group |= {key: value for key, value in part.items() if key != "params"}
        finally:
            self._adam.param_groups = groups
        torch.cuda.current_stream().synchronize()  # whoever reads them next may do so without the device

    def _pieces(self, weights: list[Tensor]) -> Iterator[list[Tensor]]:
        piece: list[Tensor] = []
        held = 0
        for weight in weights:
            size = len(MOMENTS) * weight.nbytes
            if piece and held + size > self._piece_bytes:
                yield piece
                piece, held = [], 0
            piece.append(weight)
            held += size
        if piece:
            yield piece

    def _update(self, piece: list[Tensor]) -> None:
        states = [self._adam.state[weight] for weight in piece]
        on_host = [{name: state[name] for name in MOMENTS} for state in states]
        for weight, state, moments in zip(piece, states, on_host):
            for name, moment in moments.items():
                state[name] = torch.empty_like(weight).copy_(moment, non_blocking=True)
        self._step()
        for state, moments in zip(states, on_host):
            for name, moment in moments.items():
                state[name] = moment.copy_(state[name], non_blocking=True)


class _HostBlocks:
    """Tensors side by side in blocks of host memory: torch rounds each pinned one up to a power of two.

    Args:
        weights: that there will be a tensor for.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._missing = sum(map(_aligned, weights))

    def zeros_like(self, weight: Tensor) -> Tensor:
        size = _aligned(weight)
        if size > self._block.numel():
            count = max(size, min(_BLOCK_BYTES, self._missing))
            self._block = torch.zeros(count, dtype=torch.uint8, pin_memory=weight.is_cuda)
        own, self._block = self._block[: weight.nbytes], self._block[size:]
        self._missing -= size
        return own.view(weight.dtype).view(weight.shape)


def _aligned(weight: Tensor) -> int:
    return -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
