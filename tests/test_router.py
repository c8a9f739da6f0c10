"""The routers of a model in training: auxiliary loss, bias, replay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_klong.config import ParallelConfig, RouterConfig
from megatron_klong.data.rows import PackedRow
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.router import recorded_routing, replayed_routing, routers
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import evaluate, forward_backward, train_step
from megatron_klong.training.trainer import Trainer, build_trainer
from tests import reference
from tests.families import ReferenceModel, changed
from tests.ranks import RankPool
from tests.test_layouts import gather_gradients

ONE = ParallelConfig()


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ReferenceModel("glm").save(tmp_path_factory.mktemp("weights"))


def trainer_with(platform: Platform, folder: Path, parallel: ParallelConfig, **router: object) -> Trainer:
    settings = changed(reference.settings(parallel, folder), router=RouterConfig.model_validate(router))
    return build_trainer(settings, load_hf_config(folder), platform)


def my_rows() -> list[PackedRow]:
    ways, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return reference.packed(reference.batch())[rank::ways]


def router_gradients(
    platform: Platform, folder: Path, parallel: ParallelConfig, **router: object
) -> list[Tensor]:
    """Of this rank's routers, by Megatron's own gradient buffers, after one batch."""
    trainer = trainer_with(platform, folder, parallel, **router)
    trainer.model.zero_grad_buffer()
    forward_backward(trainer, my_rows(), sft_objective, forward_only=False)
    gather_gradients(trainer)
    return [each.weight.main_grad.clone() for each in routers(trainer.model.module)]


def balancing_gradients(coefficient: float) -> list[Tensor]:
    """By transformers' router and the formula: the mean over rows of c E sum_e f_e P_e, by hand.

    f_e is the share of choices that fall on expert e (their sum is k / k = 1), P_e its mean probability, the
    sigmoid scores made to sum to one (DeepSeek-V3, formulas 17 to 20; here Megatron chooses without the
    bias).
    """
    model = ReferenceModel("glm").model
    weights = [model.model.layers[number].mlp.gate.weight for number in (1, 2, 3)]
    seen: list[Tensor] = []
    hooks = [
        model.model.layers[number].mlp.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
        for number in (1, 2, 3)
    ]
    total = torch.zeros(())
    rows = reference.packed(reference.batch())
    for row in rows:
        hidden: list[list[Tensor]] = [[], [], []]
        for start, stop in zip(row.cu_seqlens, row.cu_seqlens[1:]):
            seen.clear()
            model.model(torch.from_numpy(row.tokens_R[start:stop])[None])
            for place, inputs in enumerate(seen):
                hidden[place].append(inputs[0])
        for place, weight in enumerate(weights):
            scores = torch.sigmoid(torch.cat(hidden[place]) @ weight.T)
            shares = scores / scores.sum(-1, keepdim=True)
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(3, -1).indices, 1.0)
            counts = chosen.sum(0) / (len(scores) * 3)
            total = total + coefficient * 8 * (counts.detach() * shares.mean(0)).sum() / len(rows)
    for hook in hooks:
        hook.remove()
    return list(torch.autograd.grad(total, weights))


@pytest.mark.parametrize(
    ("parallel", "world"),
    [(ONE, 1), (ParallelConfig(tensor=2, expert=2), 2), (ParallelConfig(context=2), 2), (ONE, 2)],
    ids=["one", "TP2EP2", "CP2", "DP2"],
)
def test_the_balancing_loss_is_its_formula_whatever_is_masked(
    ranks: RankPool, weights: Path, parallel: ParallelConfig, world: int
) -> None:
    """About half of the tokens are trained; Megatron's own scaling would count the loss about twice."""
    off = ranks.run(router_gradients, parallel, world, folder=weights, parallel=parallel)[0]
    options = {"balancing": "aux_loss", "balancing_coefficient": 0.5}
    on = ranks.run(router_gradients, parallel, world, folder=weights, parallel=parallel, **options)[0]
    for with_loss, without, expected in zip(on, off, balancing_gradients(0.5), strict=True):
        assert float((with_loss - without - expected).norm() / expected.norm()) < 1e-4


def moved_biases(
    platform: Platform, folder: Path, parallel: ParallelConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Biases before and after a step with updates, of this rank's layers."""
    trainer = trainer_with(platform, folder, parallel, bias_update_rate=0.01)
    before = [each.expert_bias.clone() for each in routers(trainer.model.module)]
    train_step(trainer, my_rows(), sft_objective)
    return before, [each.expert_bias.clone() for each in routers(trainer.model.module)]


def test_the_bias_moves_towards_idle_experts_alike_at_every_layout(ranks: RankPool, weights: Path) -> None:
    ((before, alone),) = ranks.run(moved_biases, ONE, 1, folder=weights, parallel=ONE)
    layout = ParallelConfig(tensor=2, context=2, expert=2)
    together = ranks.run(moved_biases, layout, 4, folder=weights, parallel=layout)
    for _, after in together:
        assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))
    ((_, chosen),) = ranks.run(choices, ONE, 1, folder=weights)
    for bias, moved, experts in zip(before, alone, chosen, strict=True):
        counts = torch.bincount(experts.flatten(), minlength=8).float()
        assert torch.allclose(moved, bias + 0.01 * torch.sign(counts.mean() - counts))


def choices(platform: Platform, folder: Path) -> tuple[float, list[Tensor]]:
    """The loss of the batch, and the experts of all its tokens by layer."""
    trainer = trainer_with(platform, folder, ONE, replay=True)
    found: list[list[Tensor]] = []
    losses = []
    for row in reference.packed(reference.batch()):
        with recorded_routing(trainer.model.module) as chosen:
            losses.append(evaluate(trainer, [row], sft_objective).loss)
        found.append(chosen)
    return sum(losses), [torch.cat(layer) for layer in zip(*found, strict=True)]


def replayed(platform: Platform, folder: Path, chosen: list[Tensor]) -> tuple[float, float]:
    """The loss of the first row, and that with given experts."""
    trainer = trainer_with(platform, folder, ONE, replay=True)
    row = my_rows()[0]
    free = evaluate(trainer, [row], sft_objective).loss
    with replayed_routing(trainer.model.module, chosen):
        forced = evaluate(trainer, [row], sft_objective).loss
    assert evaluate(trainer, [row], sft_objective).loss == free  # and afterwards the router decides again
    return free, forced


def test_given_experts_are_used(ranks: RankPool, weights: Path) -> None:
    ((_, recorded),) = ranks.run(choices, ONE, 1, folder=weights)
    first_row = [layer[: reference.ROW_TOKENS] for layer in recorded]
    ((free, same),) = ranks.run(replayed, ONE, 1, folder=weights, chosen=first_row)
    assert same == free
    turned = [(layer + 1) % 8 for layer in first_row]
    ((_, forced),) = ranks.run(replayed, ONE, 1, folder=weights, chosen=turned)
    assert abs(forced - free) > 1e-3


def misused(platform: Platform, folder: Path) -> None:
    without = trainer_with(platform, folder, ONE).model.module
    with pytest.raises(ValueError, match=r"build the model with model\.router\.replay=true"):
        recorded_routing(without).__enter__()
    able = trainer_with(platform, folder, ONE, replay=True).model.module
    with pytest.raises(ValueError, match=r"1 layers given, the model has 3 here"):
        replayed_routing(able, [torch.zeros(64, 3, dtype=torch.int64)]).__enter__()


def test_replay_that_cannot_be_is_refused(ranks: RankPool, weights: Path) -> None:
    ranks.run(misused, ONE, 1, folder=weights)
