"""The schedules' values and what clipping does, against formulas written out here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_klong.config import OptimizerConfig, ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import train_step
from megatron_klong.training.trainer import _scheduler, build_trainer
from tests import reference
from tests.families import ReferenceModel
from tests.ranks import RankPool

HIGH, LOW, WARM, STEPS, LAST = 2e-3, 1e-4, 4, 20, 6


def rates(**settings: object) -> list[float]:
    """Of every step of a run."""
    config = OptimizerConfig.model_validate({"lr": HIGH, "min_lr": LOW, "warmup_steps": WARM, **settings})
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=HIGH)
    scheduler = _scheduler(config, STEPS, optimizer)
    found = []
    for _ in range(STEPS):
        scheduler.step(increment=1)  # before the update, as in train_step
        found.append(float(optimizer.param_groups[0]["lr"]))
    return found


def cosine(share: float) -> float:
    return LOW + (HIGH - LOW) * (1 + math.cos(math.pi * share)) / 2


def line(share: float) -> float:
    return HIGH + (LOW - HIGH) * share


def since(step: int) -> float:
    """Share of the way from the end of the warm-up to the last step."""
    return (step - WARM) / (STEPS - WARM)


def late(step: int) -> float:
    """Share of the last steps, of those that WSD falls in."""
    return max(0.0, (step - (STEPS - LAST)) / LAST)


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"schedule": "constant"}, lambda step: HIGH),
        ({"schedule": "cosine"}, lambda step: cosine(since(step))),
        ({"schedule": "linear"}, lambda step: line(since(step))),
        ({"schedule": "wsd", "decay_steps": LAST, "decay_shape": "linear"}, lambda step: line(late(step))),
        ({"schedule": "wsd", "decay_steps": LAST, "decay_shape": "cosine"}, lambda step: cosine(late(step))),
    ],
    ids=str,
)
def test_learning_rates(settings: dict[str, object], rate: object) -> None:
    assert callable(rate)
    found = rates(**settings)
    assert found[:WARM] == pytest.approx([HIGH * step / WARM for step in range(1, WARM + 1)])
    assert found[WARM:] == pytest.approx([rate(step) for step in range(WARM + 1, STEPS + 1)])


def first_moments(platform: Platform, folder: Path, clip: float) -> tuple[float, float]:
    """After one step: the norm of the gradients, and of the moments that are a tenth of what was taken."""
    settings = reference.settings(ParallelConfig(), folder)
    optimizer = settings.optimizer.model_copy(update={"clip_grad": clip, "beta1": 0.9})
    settings = settings.model_copy(update={"optimizer": optimizer})
    trainer = build_trainer(settings, load_hf_config(folder), platform)
    result = train_step(trainer, reference.packed(reference.batch()), sft_objective)
    states = [s for part in trainer.optimizer.chained_optimizers for s in part.optimizer.state.values()]
    return result.grad_norm, math.sqrt(sum(float(state["exp_avg"].square().sum()) for state in states))


def test_gradients_are_clipped_to_the_norm(ranks: RankPool, tmp_path: Path) -> None:
    """Adam's first step is the same for any length of the gradient; its first moment is not."""
    folder = ReferenceModel("glm").save(tmp_path / "hf")
    ((norm, moment),) = ranks.run(first_moments, ParallelConfig(), 1, folder=folder, clip=0.0)
    assert norm > 0.1 and moment == pytest.approx(0.1 * norm, rel=1e-4)
    clip = norm / 7
    ((same, clipped),) = ranks.run(first_moments, ParallelConfig(), 1, folder=folder, clip=clip)
    assert same == norm and clipped == pytest.approx(0.1 * clip, rel=1e-4)
