"""The router of an expert layer, and what a trainer may do with all routers of a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from torch import Tensor
from torch.nn import Module

from megatron_klong.model.row_model import RankModel


class Router(TopKRouter):
    """Megatron's router, with a balancing loss that masks do not inflate, and padding that does not count.

    The sum of token losses is divided by the *trained* tokens of the global batch, and so is whatever is
    added to it. Megatron scales the balancing loss by a micro-batch's tokens, all of them: of a batch of
    which a tenth is trained it would count ten times. Here it is scaled by the trained tokens that a
    micro-batch has on average over the global batch, so that in the end its gradient is the coefficient
    times the mean over micro-batches (design, SFT loss).
    """

    units_per_micro_batch: float | None = None
    balancing: Tensor | None = None
    """Sum of this rank's parts of the loss, without the coefficient; None where there is none."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Megatron's, after a look at what is replayed."""
        replay = self.router_replay
        if replay is not None and replay.router_replay_action is RouterReplayAction.REPLAY_FORWARD:
            given, wanted = (
                tuple(_present(replay.target_topk_idx).shape),
                (logits.shape[:2].numel(), self.topk),
            )
            if given != wanted:
                raise ValueError(f"routing replay: experts of shape {given} given, the row has {wanted} here")
        chosen: tuple[Tensor, Tensor] = super().routing(logits, padding_mask)
        return chosen

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:  # Megatron's own subtraction does not fit the map's shape
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        super()._apply_expert_bias(routing_map)

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *_names: Any,
        reduce_group_has_dp: bool = False, **_options: Any,
    ) -> Tensor:  # fmt: skip
        """Tie the loss to the gradient of ``activation``, and sum it up."""
        assert self.units_per_micro_batch is not None, "begin_batch comes before a step"
        # Each data-parallel rank has a part of a loss over the global batch, and the whole of another one.
        ways = parallel_state.get_data_parallel_world_size() if reduce_group_has_dp else 1
        part = aux_loss.detach() * ways / aux_loss_coeff
        self.balancing = part if self.balancing is None else self.balancing + part
        tied: Tensor = MoEAuxLossAutoScaler.apply(activation, aux_loss * ways * self.units_per_micro_batch)
        return tied


def routers(model: RankModel) -> list[Router]:
    """Of this rank's decoder layers, in order."""
    return [module for stage in model for module in stage.decoder.modules() if isinstance(module, Router)]


def expert_biases(model: Module) -> list[Tensor]:
    """Of all routers, prediction layers included, that have one."""
    found = [module.expert_bias for module in model.modules() if isinstance(module, Router)]
    return [bias for bias in found if bias is not None]


def begin_batch(model: Module, units_per_micro_batch: float) -> None:
    """Before the micro-batches of a step.

    Args:
        units_per_micro_batch: what the gradients of the step will be divided by, over its micro-batches.
    """
    for module in model.modules():
        if isinstance(module, Router):
            module.units_per_micro_batch, module.balancing = units_per_micro_batch, None


def balancing_sum(model: RankModel) -> Tensor | None:
    """Of this rank's decoder layers and micro-batches, in parts that add up over TP and CP ranks."""
    parts = [router.balancing for router in routers(model) if router.balancing is not None]
    return torch.stack(parts).sum() if parts else None


@contextmanager
def recorded_routing(model: RankModel) -> Iterator[list[Tensor]]:
    """Within, a forward pass leaves the experts it chose: int64 ``[T, k]`` for each of :func:`routers`.

    The list is filled at the end, with one row: the last one that went through. T are the tokens of this
    rank (with sequence parallelism, its share). The model must be built with routing replay.
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
def replayed_routing(model: RankModel, chosen: list[Tensor]) -> Iterator[None]:
    """Within, a forward pass sends tokens to the experts given, whatever the router would choose.

    The weights of the chosen ones are still the router's, and so is their gradient.

    Args:
        chosen: as :func:`recorded_routing` gives them, for one row, padding included.
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


def _replays(model: RankModel) -> list[RouterReplay]:
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
