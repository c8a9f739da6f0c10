"""Activations that are computed again: the same losses and gradients, and less that is kept."""

from __future__ import annotations

import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

from megatron_klong.config import ModelConfig, ParallelConfig, RouterConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.router import routers
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import BatchSums, forward_backward
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import ReferenceModel, changed
from tests.ranks import RankPool

ONE = ParallelConfig()
SHARED = ParallelConfig(tensor=2, pipeline=2, virtual=2, expert=2)
WAYS: list[dict[str, Any]] = [
    {"recompute": "full"},
    {"recompute": "full", "recompute_layers": 1},
    {"recompute": ("core_attn",)},
    {"recompute": ("layernorm",)},
    {"recompute": ("mlp", "moe")},
    {"recompute": ("shared_experts",)},
    {"recompute": ("core_attn", "layernorm", "mlp", "moe")},
]


class KeptBytes:
    """Bytes of all storages that wait for backward, weights left out, and the most there were at once."""

    def __init__(self, model: Module) -> None:
        self.weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        self.uses: Counter[int] = Counter()
        self.now = self.peak = 0

    def keep(self, tensor: Tensor) -> list[Tensor]:
        """A list that lives as long as the graph does: its end is the tensor's."""
        storage, held = tensor.untyped_storage(), Held([tensor])
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.weights:
            self.now += 0 if self.uses[place] else size
            self.peak = max(self.peak, self.now)
            self.uses[place] += 1
            weakref.finalize(held, self._free, place, size)
        return held

    def give(self, held: list[Tensor]) -> Tensor:
        return held[0]

    def _free(self, place: int, size: int) -> None:
        self.uses[place] -= 1
        self.now -= 0 if self.uses[place] else size


class Held(list[Tensor]):
    """A list that can be watched."""


def computed(
    platform: Platform, folder: Path, parallel: ParallelConfig, model: dict[str, Any]
) -> tuple[BatchSums, list[Tensor], int, list[Tensor]]:
    """Sums, gradients, most bytes kept for backward, and what routers have counted."""
    settings = changed(reference.settings(parallel, folder), **model)
    trainer = build_trainer(settings, load_hf_config(folder), platform)
    trainer.model.train()
    trainer.zero_gradients()
    ways, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = reference.packed(reference.batch())[rank::ways]
    kept = KeptBytes(trainer.model)
    with saved_tensors_hooks(kept.keep, kept.give):
        sums = forward_backward(
            trainer, rows[:1] if parallel == ONE else rows, sft_objective, forward_only=False
        )
    gradients = [w.main_grad.clone() for w in trainer.model.parameters() if w.requires_grad]
    counted = [
        router.local_tokens_per_expert.clone()
        for router in routers(trainer.model)
        if router.local_tokens_per_expert is not None
    ]
    return sums, gradients, kept.peak, counted


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ReferenceModel("glm-prediction").save(tmp_path_factory.mktemp("glm"))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "+".join(map(str, way.values())))
def test_nothing_but_memory_changes(ranks: RankPool, folder: Path, way: dict[str, Any]) -> None:
    """With prediction layers and balanced routers, where Megatron can do it: these count what passes them."""
    more: dict[str, Any] = {}
    if "recompute_layers" not in way:
        balanced = RouterConfig(balancing="aux_loss", balancing_coefficient=0.1, bias_update_rate=0.01)
        more = {"prediction": "train", "router": balanced}
    plain = ranks.run(computed, SHARED, 4, folder=folder, parallel=SHARED, model=more)
    again = ranks.run(computed, SHARED, 4, folder=folder, parallel=SHARED, model={**more, **way})
    for (sums, gradients, _, counted), (sums_2, gradients_2, _, counted_2) in zip(plain, again):
        assert sums == sums_2
        for ours, theirs in zip(gradients, gradients_2, strict=True):  # summed in another order
            assert float((ours - theirs).norm()) <= 1e-6 * float(ours.norm())
        assert all(map(torch.equal, counted, counted_2)) and len(counted) == len(counted_2)
    assert not more or (plain[0][0].prediction_loss is not None and plain[0][0].balancing_loss is not None)


def test_less_is_kept(ranks: RankPool, folder: Path) -> None:
    def kept(**model: Any) -> int:
        return ranks.run(computed, ONE, 1, folder=folder, parallel=ONE, model=model)[0][2]

    plain, full = kept(), kept(recompute="full")
    assert full < plain / 2
    assert full < kept(recompute="full", recompute_layers=2) < plain
    for module in ("core_attn", "layernorm", "mlp", "moe", "shared_experts"):
        assert kept(recompute=(module,)) < plain, module


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"recompute_layers": 2}, "model.recompute_layers=2 needs model.recompute=full, not 'none'"),
        (
            {"recompute": "full", "recompute_layers": 2, "prediction": "train"},
            "all layers are recomputed, or none",
        ),
        ({"recompute": ("attention",)}, "Input should be 'core_attn'"),
    ],
)
def test_impossible_ways_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({"preset": "tiny-glm-4.5", **given})
