"""Adam's moments in host memory: the same training, and little of them on the device at a time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_klong.config import ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training import trainer as building
from megatron_klong.training.checkpointing import load_checkpoint, save_checkpoint
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.moments import MOMENTS, keep_moments_on_host
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.sft import SftProgress
from megatron_klong.training.step import train_step
from megatron_klong.training.trainer import Trainer, build_trainer
from tests import reference
from tests.families import ReferenceModel, changed
from tests.ranks import RankPool

PARALLEL = ParallelConfig(expert=2, nproc=2)
PIECE = 100_000


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ReferenceModel("glm").save(tmp_path_factory.mktemp("weights"))


def built(platform: Platform, folder: Path, precision: str, *, offload: bool) -> Trainer:
    settings = changed(reference.settings(PARALLEL, folder), precision=precision)
    optimizer = settings.optimizer.model_copy(update={"offload": offload, "schedule": "cosine"})
    building.keep_moments_on_host = lambda each: keep_moments_on_host(each, PIECE)
    return build_trainer(
        settings.model_copy(update={"optimizer": optimizer}), load_hf_config(folder), platform
    )


def steps(trainer: Trainer, count: int) -> list[tuple[float, float]]:
    rank = torch.distributed.get_rank()
    rows = reference.packed(reference.batch())[rank::2]
    results = [train_step(trainer, rows, sft_objective) for _ in range(count)]
    return [(result.loss, result.grad_norm) for result in results]


def adams(trainer: Trainer) -> list[Any]:
    return [part.optimizer for part in trainer.optimizer.chained_optimizers]


def state(trainer: Trainer) -> list[Tensor]:
    """Weights and everything of the optimizer, in order."""
    inner = [
        each
        for adam in adams(trainer)
        for group in adam.param_groups
        for weight in group["params"]
        for each in (weight, *(adam.state[weight][name] for name in (*MOMENTS, "step")))
    ]
    return [each.detach().clone() for each in (*trainer.model.parameters(), *inner)]


def trained(
    platform: Platform, folder: Path, out: Path, precision: str
) -> list[tuple[list[tuple[float, float]], list[Tensor]]]:
    """Five steps with and without, from the first step on, and from the others' checkpoints."""
    kept = built(platform, folder, precision, offload=False)
    moved = built(platform, folder, precision, offload=True)
    first = [(steps(each, 2), state(each)) for each in (kept, moved)]
    for name, each in (("kept", kept), ("moved", moved)):
        save_checkpoint(each, SftProgress(2), out / name, keep_last=1)
    for name, each in (("moved", kept), ("kept", moved)):
        steps(each, 1)  # changes everything that is to be loaded
        assert load_checkpoint(each, out / name / "step_00000002", SftProgress) == SftProgress(2)
    return [*first, *((steps(each, 3), state(each)) for each in (kept, moved))]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_training_is_the_same_bit_for_bit(
    ranks: RankPool, weights: Path, tmp_path: Path, precision: str
) -> None:
    """Checkpoints too, each loaded by the other."""
    for of_rank in ranks.run(trained, PARALLEL, 2, folder=weights, out=tmp_path, precision=precision):
        for (kept, kept_state), (moved, moved_state) in (of_rank[:2], of_rank[2:]):
            assert kept == moved
            assert len(kept_state) == len(moved_state)
            assert all(torch.equal(a, b) for a, b in zip(kept_state, moved_state))
        assert of_rank[0][0] != of_rank[2][0]


def watched(platform: Platform, folder: Path) -> tuple[list[int], list[int], bool]:
    """Bytes of moments that are not in host memory, at each update; those of each parameter; are all there
    afterwards?"""
    trainer = built(platform, folder, "bf16", offload=True)
    home = {
        (weight, name): adam.state[weight][name]
        for adam in adams(trainer)
        for group in adam.param_groups
        for weight in group["params"]
        for name in MOMENTS
    }
    away: list[int] = []

    def look(adam: Any, _arguments: object, _options: object) -> None:
        away.append(
            sum(
                moments[name].nbytes
                for each in adams(trainer)
                for weight, moments in each.state.items()
                for name in MOMENTS
                if moments[name] is not home[weight, name]
            )
        )

    for adam in adams(trainer):
        adam.register_step_pre_hook(look)
    steps(trainer, 2)
    back = all(
        adam.state[weight][name] is home[weight, name] and bool(home[weight, name].any())
        for adam in adams(trainer)
        for weight in adam.state
        for name in MOMENTS
    )
    sizes = [2 * moment.nbytes for (_, name), moment in home.items() if name == MOMENTS[0]]
    return away, sizes, back


def test_a_piece_at_a_time_is_away_from_the_host(ranks: RankPool, weights: Path) -> None:
    for away, sizes, back in ranks.run(watched, PARALLEL, 2, folder=weights):
        assert back
        assert sum(away) == 2 * sum(sizes)
        assert len(away) < 2 * len(sizes)  # small ones go together
        assert max(away) <= max(PIECE, *sizes) < sum(sizes) / 4


def test_apex_is_refused() -> None:
    """Its Adam walks through lists of its own beside the groups, which a piece would cut short."""
    optimizer = SimpleNamespace(
        chained_optimizers=[SimpleNamespace(optimizer=SimpleNamespace(param_groups_master=[]))]
    )
    with pytest.raises(RankError, match=r"optimizer\.offload=true needs Transformer Engine's Adam"):
        keep_moments_on_host(optimizer)
