"""The routers of a model in training: auxiliary loss, bias, replay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
) -> tuple[float | None, dict[int, Tensor]]:
    """The balancing loss, and the gradients of this rank's routers by layer, after one batch."""
    trainer = trainer_with(platform, folder, parallel, **router)
    trainer.zero_gradients()
    sums = forward_backward(trainer, my_rows(), sft_objective, forward_only=False)
    gather_gradients(trainer)
    gradients = {each.layer_number: each.weight.main_grad.clone() for each in routers(trainer.model)}
    return sums.balancing_loss, gradients


def hidden_before_routers(model: Any, row: PackedRow) -> list[Tensor]:
    """What the three routers see of a row's samples, ``[tokens, hidden]`` each, padding left out."""
    seen: list[list[Tensor]] = [[], [], []]
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _m, inputs, place=place: seen[place].append(inputs[0][0]))
        for place, layer in enumerate(model.model.layers[1:])
    ]
    for start, stop in zip(row.cu_seqlens, row.cu_seqlens[1:]):
        if start < row.sample_tokens:
            model.model(torch.from_numpy(row.tokens_R[start:stop])[None])
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts) for parts in seen]


def balancing_loss(weight: Tensor, hidden: Tensor) -> Tensor:
    """E sum_e f_e P_e (DeepSeek-V3, formulas 17 to 20), by hand.

    f_e is the share of choices that fall on expert e, P_e its mean probability, the sigmoid scores made to
    sum to one. Megatron chooses without the bias here.
    """
    scores = torch.sigmoid(hidden @ weight.T)
    chosen = torch.zeros_like(scores).scatter(1, scores.topk(3, -1).indices, 1.0)
    shares = scores / scores.sum(-1, keepdim=True)
    return 8 * (chosen.sum(0) / chosen.sum() * shares.mean(0)).sum()


def expected_balancing(kind: str) -> tuple[float, list[Tensor]]:
    """The loss, a mean over rows and layers or over layers alone, and its gradients times 0.5."""
    model = ReferenceModel("glm").model
    weights = [layer.mlp.gate.weight for layer in model.model.layers[1:]]
    rows = [hidden_before_routers(model, row) for row in reference.packed(reference.batch())]
    if kind == "global_aux_loss":
        rows = [[torch.cat(parts) for parts in zip(*rows, strict=True)]]
    losses = [balancing_loss(weight, hidden) for row in rows for weight, hidden in zip(weights, row)]
    total = torch.stack(losses).sum() / len(rows)
    return float(total.detach()) / 3, list(torch.autograd.grad(0.5 * total, weights))


@pytest.mark.parametrize(
    ("kind", "parallel", "world"),
    [
        ("aux_loss", ONE, 1),
        ("aux_loss", ParallelConfig(tensor=2, expert=2), 2),
        ("aux_loss", ParallelConfig(context=2), 2),
        ("aux_loss", ONE, 2),
        ("aux_loss", ParallelConfig(pipeline=2), 2),
        ("aux_loss", ParallelConfig(pipeline=2, virtual=2), 2),
        ("global_aux_loss", ONE, 4),
    ],
    ids=["one", "TP2EP2", "CP2", "DP2", "PP2", "PP2VPP2", "global-DP4"],
)
def test_the_balancing_loss_is_its_formula_whatever_is_masked(
    ranks: RankPool, weights: Path, kind: str, parallel: ParallelConfig, world: int
) -> None:
    """About half of the tokens are trained; Megatron's own scaling would count the loss about twice."""
    off = ranks.run(router_gradients, parallel, world, folder=weights, parallel=parallel)
    options = {"balancing": kind, "balancing_coefficient": 0.5}
    on = ranks.run(router_gradients, parallel, world, folder=weights, parallel=parallel, **options)
    loss, expected = expected_balancing(kind)
    added = {
        layer: gradient - without[layer]
        for (_, with_loss), (_, without) in zip(on, off)
        for layer, gradient in with_loss.items()
    }
    for (_, ours), gradient in zip(sorted(added.items()), expected, strict=True):
        assert float((ours - gradient).norm() / gradient.norm()) < 1e-4
    assert {reported for reported, _ in off} == {None}
    assert all(reported == pytest.approx(loss, rel=1e-5) for reported, _ in on)


def moved_biases(
    platform: Platform, folder: Path, parallel: ParallelConfig
) -> tuple[list[Tensor], list[Tensor]]:
    """Biases before and after a step with updates, of this rank's layers."""
    trainer = trainer_with(platform, folder, parallel, bias_update_rate=0.01)
    before = [each.expert_bias.clone() for each in routers(trainer.model)]
    train_step(trainer, my_rows(), sft_objective)
    return before, [each.expert_bias.clone() for each in routers(trainer.model)]


def test_the_bias_moves_towards_idle_experts_alike_at_every_layout(ranks: RankPool, weights: Path) -> None:
    ((before, alone),) = ranks.run(moved_biases, ONE, 1, folder=weights, parallel=ONE)
    layout = ParallelConfig(tensor=2, context=2, expert=2)
    together = ranks.run(moved_biases, layout, 4, folder=weights, parallel=layout)
    for _, after in together:
        assert all(torch.equal(a, b) for a, b in zip(after, alone, strict=True))
    ((_, chosen),) = ranks.run(choices, ONE, 1, folder=weights)
    for bias, moved, experts in zip(before, alone, without_padding(chosen), strict=True):
        counts = torch.bincount(experts.flatten(), minlength=8).float()
        assert torch.allclose(moved, bias + 0.01 * torch.sign(counts.mean() - counts))


def choices(platform: Platform, folder: Path) -> tuple[float, list[Tensor]]:
    """The loss of the batch, and the experts of all its tokens by layer."""
    trainer = trainer_with(platform, folder, ONE, replay=True)
    found: list[list[Tensor]] = []
    losses = []
    for row in reference.packed(reference.batch()):
        with recorded_routing(trainer.model) as chosen:
            losses.append(evaluate(trainer, [row], sft_objective).loss)
        found.append(chosen)
    return sum(losses), [torch.cat(layer) for layer in zip(*found, strict=True)]


def without_padding(chosen: list[Tensor]) -> list[Tensor]:
    """Of :func:`choices`, those of samples."""
    used = [row.sample_tokens for row in reference.packed(reference.batch())]
    return [
        torch.cat([row[:count] for row, count in zip(layer.split(reference.ROW_TOKENS), used, strict=True)])
        for layer in chosen
    ]


def replayed(platform: Platform, folder: Path, chosen: list[Tensor]) -> tuple[float, float]:
    """The loss of the first row, and that with given experts."""
    trainer = trainer_with(platform, folder, ONE, replay=True)
    row = my_rows()[0]
    free = evaluate(trainer, [row], sft_objective).loss
    with replayed_routing(trainer.model, chosen):
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
    without = trainer_with(platform, folder, ONE).model
    with pytest.raises(ValueError, match=r"build the model with model\.router\.replay=true"):
        recorded_routing(without).__enter__()
    able = trainer_with(platform, folder, ONE, replay=True).model
    with pytest.raises(ValueError, match=r"1 layers given, the model has 3 here"):
        replayed_routing(able, [torch.zeros(64, 3, dtype=torch.int64)]).__enter__()
    trainer = trainer_with(platform, folder, ONE, replay=True)
    short = [torch.zeros(60, 3, dtype=torch.int64)] * 3
    with (
        replayed_routing(trainer.model, short),
        pytest.raises(ValueError, match=r"experts of shape \(60, 3\) given, the row has \(64, 3\) here"),
    ):
        evaluate(trainer, my_rows()[:1], sft_objective)


def layers_with_prediction(platform: Platform, folder: Path) -> int:
    trainer = trainer_with(platform, folder, ONE, replay=True)
    with recorded_routing(trainer.model) as chosen:
        evaluate(trainer, my_rows()[:1], sft_objective)
    return len(chosen)


def test_prediction_layers_are_not_replayed(ranks: RankPool, tmp_path: Path) -> None:
    folder = ReferenceModel("glm-prediction").save(tmp_path)
    assert ranks.run(layers_with_prediction, ONE, 1, folder=folder) == [3]


def test_replay_that_cannot_be_is_refused(ranks: RankPool, weights: Path) -> None:
    ranks.run(misused, ONE, 1, folder=weights)
