"""The router of an expert layer, and what a trainer may do with all routers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor


class Router(TopKRouter):
    """Megatron's router, with an auxiliary loss that masks do not inflate.

    The sum of token losses is divided by the *trained* tokens of the global batch, and so is whatever is
    added to it. Megatron scales the auxiliary loss by a micro-batch's tokens, all of them: of a batch of
    which a tenth is trained it would count ten times. Here it is scaled by the trained tokens that a
    micro-batch has on average over the global batch, so that in the end its gradient is the coefficient
    times the mean over micro-batches (design, SFT loss).
    """

    units_per_micro_batch: float | None = None

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, *arguments: Any, valid_token_count: Any = None, **options: Any
    ) -> Tensor:
        """Megatron's, with another count."""
        assert self.units_per_micro_batch is not None, "set_units_per_micro_batch comes before a step"
        scaled: Tensor = super().attach_and_log_load_balancing_loss(
            activation, *arguments, valid_token_count=self.units_per_micro_batch, **options
        )
        return scaled


def routers(model: GPTModel) -> list[Router]:
    """Of this rank's layers, in order; those of prediction layers last."""
    return [module for module in model.modules() if isinstance(module, Router)]


def set_units_per_micro_batch(model: GPTModel, units: float) -> None:
    """Tell the auxiliary losses what the gradients of a step will be divided by, per micro-batch.

    Args:
        units: of the global batch, over its number of micro-batches.
    """
    for router in routers(model):
        router.units_per_micro_batch = units


@contextmanager
def recorded_routing(model: GPTModel) -> Iterator[list[Tensor]]:
    """Within, a forward pass leaves the experts it chose: int64 ``[T, k]`` for each of :func:`routers`.

    The list is filled at the end. T are the tokens of this rank (with sequence parallelism, its share).
    The model must be built with routing replay.
    """
    replays = _replays(model)
    chosen: list[Tensor] = []
    _act(replays, RouterReplayAction.RECORD)
    try:
        yield chosen
        chosen += [_present(replay.get_recorded_indices()).clone() for replay in replays]
    finally:
        _end(replays)


@contextmanager
def replayed_routing(model: GPTModel, chosen: list[Tensor]) -> Iterator[None]:
    """Within, a forward pass sends tokens to the experts given, whatever the router would choose.

    The weights of the chosen ones are still the router's, and so is their gradient.

    Args:
        chosen: as :func:`recorded_routing` gives them, or as an inference engine reports them.
    """
    replays = _replays(model)
    if len(chosen) != len(replays):
        raise ValueError(f"routing replay: {len(chosen)} layers given, the model has {len(replays)} here")
    for replay, experts in zip(replays, chosen):
        replay.set_target_indices(experts)
    _act(replays, RouterReplayAction.REPLAY_FORWARD)
    try:
        yield
    finally:
        _end(replays)


def _replays(model: GPTModel) -> list[RouterReplay]:
    found = [router.router_replay for router in routers(model)]
    if any(replay is None for replay in found):
        raise ValueError("routing replay: build the model with model.router.replay=true")
    return found


def _act(replays: list[RouterReplay], action: RouterReplayAction) -> None:
    for replay in replays:
        replay.set_router_replay_action(action)


def _end(replays: list[RouterReplay]) -> None:
    for replay in replays:
        replay.clear_router_replay_action()
        replay.clear_indices()


def _present(indices: torch.Tensor | None) -> Tensor:
    assert indices is not None, "a forward pass records every layer"
    return indices
