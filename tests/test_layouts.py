"""Every family at every layout against transformers: loss and gradients of a packed batch, fp32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_klong.config import ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import take_shard, weight_rules
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import forward_backward
from megatron_klong.training.trainer import Trainer, build_trainer
from tests import reference
from tests.families import CONFIGS, PREDICTION_LOSS_WEIGHT, ReferenceModel, changed, rank_gradients
from tests.ranks import RankPool


def layout(
    world: int, tensor: int = 1, pipeline: int = 1, expert: int = 1, context: int = 1, virtual: int = 1
) -> tuple[ParallelConfig, int]:
    parallel = ParallelConfig(
        tensor=tensor, pipeline=pipeline, expert=expert, context=context, virtual=virtual
    )
    return parallel, world


ONE = layout(1)
CASES = [
    *((family, ONE) for family in CONFIGS),
    ("glm", layout(2, tensor=2)),
    ("glm", layout(2, tensor=2, expert=2)),
    ("glm", layout(2, pipeline=2)),
    ("glm", layout(3, pipeline=3)),
    ("glm", layout(2, expert=2)),
    ("glm", layout(2, context=2)),
    ("glm", layout(2)),
    ("glm", layout(4, context=4)),
    ("glm", layout(4, tensor=2, pipeline=2, expert=2)),
    ("glm", layout(4, tensor=2, context=2, expert=4)),
    ("glm", layout(4, context=2, pipeline=2, expert=2)),
    ("glm", layout(8, tensor=2, pipeline=2, expert=4)),
    ("glm", layout(2, pipeline=2, virtual=2)),
    ("glm", layout(4, pipeline=2, virtual=2)),
    ("glm", layout(4, tensor=2, pipeline=2, virtual=2, expert=2)),
    ("glm-prediction", layout(2, tensor=2)),
    ("glm-prediction", layout(2, context=2)),
    ("glm-prediction", layout(4, tensor=2, pipeline=2, expert=2)),
    ("glm-prediction", layout(6, pipeline=3, expert=2)),
    ("glm-prediction", layout(4, pipeline=2, virtual=2, expert=2)),
    ("qwen3-moe", layout(4, tensor=2, pipeline=2, expert=2)),
    ("qwen3-moe-unnormalized", layout(4, tensor=2, context=2, expert=2)),
    ("qwen3", layout(4, tensor=2, context=2)),
    ("qwen3-tied", layout(4, tensor=2, pipeline=2)),
    ("qwen3-tied", layout(4, context=2, pipeline=2)),
    ("qwen3-tied", layout(4, context=2, pipeline=2, virtual=2)),
]  # fmt: skip


def case_name(value: object) -> str:
    if isinstance(value, str):
        return value
    parallel, world = value  # type: ignore[misc]
    return f"{parallel.name(world).replace(' ', '')}of{world}"


def loss_and_errors(
    platform: Platform, folder: Path, parallel: ParallelConfig, gradients: Path
) -> tuple[tuple[float, float | None], dict[str, float], set[str]]:
    """The losses; of each weight on this rank how far its gradient is off, relative to the whole one."""
    hf = load_hf_config(folder)
    settings = changed(
        reference.settings(parallel, folder),
        prediction="train",
        prediction_loss_weight=PREDICTION_LOSS_WEIGHT,
    )
    trainer = build_trainer(settings, hf, platform)
    trainer.zero_gradients()
    ways, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    mine = reference.packed(reference.batch())[rank::ways]
    sums = forward_backward(trainer, mine, sft_objective, forward_only=False)
    gather_gradients(trainer)
    expected: dict[str, Tensor] = torch.load(gradients)
    rules, errors, covered = weight_rules(hf), {}, set()
    group = trainer.model[0].pg_collection.tp
    for name, gradient in rank_gradients(trainer).items():
        rule = rules[name]
        whole = rule.join.join([expected[part.name] for part in rule.hf])
        share = take_shard(rule.shard, whole, group.rank(), group.size())
        errors[name] = float((gradient - share).norm() / whole.norm())
        covered |= {part.name for part in rule.hf}
    return (sums.loss, sums.prediction_loss), errors, covered


def gather_gradients(trainer: Trainer) -> None:
    """Megatron leaves each data-parallel rank its share of the summed gradients; bring them together."""
    for stage in trainer.stages:
        for group in (*stage.bucket_groups, *stage.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                share = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                torch.distributed.all_gather_into_tensor(bucket.grad_data, share, group=ranks)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, float]]:
    """Of each family: the folder with weights and gradients, and the loss. Filled as they are asked for."""
    return {}


@pytest.mark.parametrize(("family", "at"), CASES, ids=case_name)
def test_loss_and_gradients_equal_transformers(
    ranks: RankPool, references: dict[str, tuple[Path, float]], tmp_path_factory: pytest.TempPathFactory,
    family: str, at: tuple[ParallelConfig, int],
) -> None:  # fmt: skip
    if family not in references:
        model = ReferenceModel(family)
        folder = model.save(tmp_path_factory.mktemp(family))
        loss, gradients = model.gradients()
        torch.save({name: grad.clone() for name, grad in gradients.items()}, folder / "gradients.pt")
        references[family] = (folder, loss)
    folder, expected = references[family]
    parallel, world = at
    answers = ranks.run(
        loss_and_errors, parallel, world, folder=folder, parallel=parallel, gradients=folder / "gradients.pt"
    )
    for (loss, prediction), errors, _ in answers:
        whole = loss + PREDICTION_LOSS_WEIGHT * (prediction or 0)
        assert (prediction is not None) == ("prediction" in family)
        assert whole == pytest.approx(expected, rel=1e-5)
        worst = max(errors, key=lambda name: errors[name])
        assert errors[worst] < 1e-5, f"{worst}: {errors[worst]:.1e}"
    assert len({loss for loss, _, _ in answers}) == 1
    covered = set().union(*(names for _, _, names in answers))
    assert covered == set(torch.load(folder / "gradients.pt"))
