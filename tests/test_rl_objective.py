"""The objective of reinforcement learning: formulas against their definitions, layouts against one rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.config import ObjectiveConfig, ParallelConfig, RlConfig
from megatron_klong.data.windows import TrainingSample
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.model.weights import rank_tensors
from megatron_klong.platform import Platform
from megatron_klong.rl.advantage import group_advantages
from megatron_klong.rl.batches import Batch, BatchHeader, read_batch, write_batch
from megatron_klong.rl.exchange import UpdateMetrics
from megatron_klong.rl.experience import Segment
from megatron_klong.rl.learner import Learner
from megatron_klong.rl.objective import RlObjective, token_terms
from megatron_klong.rl.rows import experience_rows
from megatron_klong.rl.statistics import mean_of, student_t
from megatron_klong.training.step import forward_backward
from megatron_klong.training.temperature import at_temperature
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import rank_gradients
from tests.ranks import RankPool

VOCAB = int(str(reference.SHAPE["vocab_size"]))
PLAIN = ObjectiveConfig(clip_low=0.2, clip_high=0.3, importance_cap=1.5)

scores = st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=2, max_size=10)


@given(scores)
def test_advantages_are_relative_to_the_graded_of_the_group(given_scores: list[float | None]) -> None:
    graded = [score for score in given_scores if score is not None]
    advantages = group_advantages(given_scores)
    if len(graded) < 2:
        assert advantages is None
        return
    assert advantages is not None and len(advantages) == len(graded)
    assert sum(advantages) == pytest.approx(0, abs=1e-12)
    for one, other, a, b in zip(graded, graded[1:], advantages, advantages[1:]):
        assert a - b == pytest.approx(one - other, abs=1e-12)
    scaled = group_advantages(given_scores, divide_by_std=True)
    assert scaled is not None
    if max(graded) - min(graded) > 1e-6:
        assert np.std(scaled) == pytest.approx(1)


numbers = st.floats(-3, 0)


@given(numbers, numbers, numbers, numbers, st.floats(-1, 1), st.floats(0, 1))
@settings(max_examples=500, deadline=None)
def test_one_token_by_the_definition(
    now: float, old: float, engine: float, reference_: float, advantage: float, beta: float
) -> None:
    """The formula of the design, in plain numbers, with its derivative by hand."""
    config = PLAIN.model_copy(update={"kl": beta})
    p_now, p_old, p_engine, p_ref = map(math.exp, (now, old, engine, reference_))
    r, w = p_now / p_old, min(p_old / p_engine, 1.5)
    clip = max(0.8, min(1.3, r))
    surrogate = min(r * advantage, clip * advantage)
    k3 = p_ref / p_now - math.log(p_ref / p_now) - 1
    given_now = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    rest = (torch.tensor(x, dtype=torch.float64) for x in (old, engine, reference_, advantage))
    terms = token_terms(given_now, *rest, config)
    assert float(terms.loss.detach()) == pytest.approx(-w * surrogate + beta * k3, rel=1e-9, abs=1e-12)
    if min(abs(r - 0.8), abs(r - 1.3), abs(advantage)) < 1e-6:
        return
    stopped = (advantage > 0 and r > 1.3) or (advantage < 0 and r < 0.8)
    terms.loss.backward()
    slope = (0.0 if stopped else -w * r * advantage) + beta * (1 - p_ref / p_now)
    assert given_now.grad is not None
    assert float(given_now.grad) == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert bool(terms.clipped) == stopped


# Batches of uneven rollouts


def segment(rollout: int, window: int, length: int, trained: int) -> Segment:
    random = np.random.default_rng((rollout, window))
    mask = np.zeros(length, dtype=bool)
    mask[np.sort(random.choice(np.arange(1, length), trained, replace=False))] = True
    sample = TrainingSample(random.integers(0, VOCAB, length), mask, rollout, window)
    return Segment(sample, random.uniform(-6, -3, trained).astype(np.float32))


def uneven_batch() -> Batch:
    """Three rollouts with 1, 3 and 2 windows, of different lengths."""
    segments = (
        segment(0, 0, 20, 5), segment(1, 0, 40, 20), segment(1, 1, 35, 7), segment(1, 2, 9, 1),
        segment(2, 0, 30, 12), segment(2, 1, 31, 3),
    )  # fmt: skip
    header = BatchHeader(
        iteration=3, stage=0, version="v", groups=("g",), rollouts=("a", "b", "c"), scores=(1.0, 0.0, 0.2),
        advantages=(0.6, -0.4, -0.2), checked=3, dropped_groups=0,
    )  # fmt: skip
    return Batch(header, segments)


def test_a_batch_is_read_as_it_was_written(tmp_path: Path) -> None:
    batch = uneven_batch()
    write_batch(tmp_path, batch.header, batch.segments)
    again = read_batch(tmp_path, 3)
    assert again.header == batch.header
    for ours, theirs in zip(again.segments, batch.segments, strict=True):
        assert np.array_equal(ours.sample.tokens_T, theirs.sample.tokens_T)
        assert np.array_equal(ours.sample.loss_mask_T, theirs.sample.loss_mask_T)
        assert (ours.sample.trajectory, ours.sample.window) == (
            theirs.sample.trajectory,
            theirs.sample.window,
        )
        assert np.array_equal(ours.log_probs, theirs.log_probs)


def by_definition(batch: Batch, table: dict[int, np.ndarray], normalise: str) -> float:
    """The objective at the start of the updates (r = 1), window by window, rollout by rollout."""
    rollouts: dict[int, list[list[float]]] = {}
    for number, part in enumerate(batch.segments):
        places = np.flatnonzero(part.sample.loss_mask_T)
        advantage = batch.header.advantages[part.sample.trajectory]
        old = table[number][places - 1]
        terms = [-min(math.exp(o - e), 1.5) * advantage for o, e in zip(old, part.log_probs)]
        rollouts.setdefault(part.sample.trajectory, []).append(terms)
    windows = [terms for parts in rollouts.values() for terms in parts]
    if normalise == "window":
        return sum(sum(terms) / len(terms) for terms in windows) / len(windows)
    if normalise == "token":
        return sum(map(sum, windows)) / sum(map(len, windows))
    means = [sum(map(sum, parts)) / sum(map(len, parts)) for parts in rollouts.values()]
    return sum(means) / len(means)


def rl_config(folder: Path, parallel: ParallelConfig, **objective: object) -> RlConfig:
    return RlConfig.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"hf_config": folder, "weights": folder, "precision": "fp32"},
            "tokenizer": folder,
            "window": {
                "max_tokens": 64,
                "overlap_tokens": 8,
                "reserve_generation": 8,
                "reserve_observation": 8,
            },
            "parallel": parallel.model_dump(),
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "server": {"model": folder, "dtype": "float32", "max_model_len": 64},
            "tasks": {"train": folder},
            "stages": [{"limit": 1, "iterations": 5}],
            "objective": {"importance_cap": 1.5, **objective},
        }
    )


def learn(
    platform: Platform, folder: Path, parallel: ParallelConfig, objective: dict[str, object], times: int = 1
) -> tuple[list[UpdateMetrics], dict[str, torch.Tensor]]:
    """Metrics of all updates, and this rank's weights after them."""
    config = rl_config(folder, parallel, **objective)
    trainer = build_trainer(config.trainer_settings, load_hf_config(folder), platform)
    learner = Learner(trainer, config)
    metrics = [update for _ in range(times) for update in learner.learn(uneven_batch())]
    weights = rank_tensors(trainer.model)
    return metrics, {name: tensor.detach().clone() for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    reference.reference_model().save_pretrained(folder)
    return folder


def log_prob_table(batch: Batch, temperature: float = 1.0) -> dict[int, np.ndarray]:
    """By transformers: of every token but the first of every segment."""
    table = {}
    for number, part in enumerate(batch.segments):
        ids = torch.from_numpy(part.sample.tokens_T)
        with torch.no_grad():
            logits = reference.reference_model()(ids[None]).logits[0] / temperature
        table[number] = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0].numpy()
    return table


ONE = ParallelConfig()


@pytest.mark.parametrize("normalise", ["window", "token", "rollout"])
def test_the_loss_of_uneven_rollouts_by_its_definition(
    ranks: RankPool, weights: Path, normalise: str
) -> None:
    batch = uneven_batch()
    expected = by_definition(batch, log_prob_table(batch), normalise)
    ((metrics, _),) = ranks.run(
        learn, ONE, 1, folder=weights, parallel=ONE, objective={"normalise": normalise}
    )
    assert metrics[0].loss == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert metrics[0].trained_tokens == 48
    assert (metrics[0].clipped, metrics[0].ratio) == (0.0, pytest.approx(1.0, abs=1e-6))


def one_gradient(platform: Platform, folder: Path, temperature: float) -> dict[str, torch.Tensor]:
    config = rl_config(folder, ONE)
    trainer = build_trainer(config.trainer_settings, load_hf_config(folder), platform)
    learner = Learner(trainer, config)
    (rows,) = experience_rows(uneven_batch(), trainer.row_tokens, config.objective, 1, seed=0)
    with at_temperature(trainer, temperature):
        ((*old,),) = (learner._log_probs(rows),)
        filled = [replace(row, old_R=given) for row, given in zip(rows, old)]
        trainer.zero_gradients()
        objective = RlObjective(config.objective, trainer.device)
        forward_backward(trainer, filled, objective, forward_only=False)
    rules, gradients = weight_rules(load_hf_config(folder)), {}
    for name, gradient in rank_gradients(trainer).items():
        parts = rules[name].join.split(gradient)
        gradients |= {part.name: grad.clone() for part, grad in zip(rules[name].hf, parts, strict=True)}
    return gradients


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_are_those_of_the_policy_gradient(
    ranks: RankPool, weights: Path, temperature: float
) -> None:
    """At r = 1: the gradient of sum over windows of mean over tokens of -w A log p, by transformers."""
    batch, model = uneven_batch(), reference.reference_model()
    model.zero_grad()
    loss = torch.zeros(())
    for part in batch.segments:
        ids, places = torch.from_numpy(part.sample.tokens_T), np.flatnonzero(part.sample.loss_mask_T)
        logits = model(ids[None]).logits[0] / temperature
        log_probs = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[places - 1, 0]
        w = torch.exp(log_probs.detach() - torch.from_numpy(part.log_probs)).clamp(max=1.5)
        advantage = batch.header.advantages[part.sample.trajectory]
        loss = loss - (w * advantage * log_probs).mean() / len(batch.segments)
    loss.backward()
    (ours,) = ranks.run(one_gradient, ONE, 1, folder=weights, temperature=temperature)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight",
                 "model.layers.0.mlp.down_proj.weight", "model.norm.weight"):  # fmt: skip
        expected = dict(model.named_parameters())[name].grad
        assert expected is not None
        assert float((ours[name] - expected).norm() / expected.norm()) < 1e-4, name


LAYOUTS = [
    (ParallelConfig(expert=2), 2),
    (ParallelConfig(tensor=2, pipeline=2, expert=2), 4),
    (ParallelConfig(pipeline=2, virtual=2), 2),
    (ParallelConfig(expert=4), 4),
    (ParallelConfig(context=2), 2),
]


@pytest.mark.parametrize(("parallel", "world"), LAYOUTS)
def test_layouts_learn_the_same(ranks: RankPool, weights: Path, parallel: ParallelConfig, world: int) -> None:
    """Two updates on each of two passes, with a reference; four ranks have more ranks than rows."""
    objective = {"updates": 2, "kl": 0.1}
    ((alone, _),) = ranks.run(learn, ONE, 1, folder=weights, parallel=ONE, objective=objective, times=2)
    answers = ranks.run(
        learn, parallel, world, folder=weights, parallel=parallel, objective=objective, times=2
    )
    for metrics, _ in answers:
        for ours, expected in zip(metrics, alone, strict=True):
            assert ours.trained_tokens == expected.trained_tokens
            for name in ("loss", "grad_norm", "clipped", "ratio", "importance", "engine_difference"):
                wanted = getattr(expected, name)
                assert getattr(ours, name) == pytest.approx(wanted, rel=1e-3, abs=1e-6), name


def test_the_second_update_is_off_policy_and_clipped(ranks: RankPool, weights: Path) -> None:
    narrow = {"updates": 2, "clip_low": 1e-4, "clip_high": 1e-4}
    ((metrics, _),) = ranks.run(learn, ONE, 1, folder=weights, parallel=ONE, objective=narrow)
    first, second = metrics
    assert first.clipped == 0 and first.ratio == pytest.approx(1, abs=1e-6)
    assert second.clipped > 0.2
    assert first.trained_tokens + second.trained_tokens == 48


def test_the_reference_is_the_model_that_the_run_started_with(ranks: RankPool, weights: Path) -> None:
    ((before, _),) = ranks.run(learn, ONE, 1, folder=weights, parallel=ONE, objective={"kl": 0.0})
    ((pulled, _),) = ranks.run(learn, ONE, 1, folder=weights, parallel=ONE, objective={"kl": 5.0}, times=3)
    # At the start the model is its own reference: the divergence is 0, and so is its part of the loss.
    assert pulled[0].loss == pytest.approx(before[0].loss, abs=1e-6)
    assert pulled[0].grad_norm == pytest.approx(before[0].grad_norm, rel=1e-4)
    # After a step it is not: k3 is above 0, and counts.
    ((free, _),) = ranks.run(learn, ONE, 1, folder=weights, parallel=ONE, objective={"kl": 1e-9}, times=2)
    assert pulled[1].loss > free[1].loss


def test_rows_hold_every_segment_once_whatever_the_ways() -> None:
    batch = uneven_batch()
    for ways in (1, 2, 4):
        updates = experience_rows(batch, 64, ObjectiveConfig(updates=2), ways, seed=1)
        assert len(updates) == 2 and len({len(rows) for rows in updates}) == 1
        assert len(updates[0]) % ways == 0
        rows = [row for part in updates for row in part]
        assert sorted(name for row in rows for name in row.samples) == [
            (0, 0),
            (1, 0),
            (1, 1),
            (1, 2),
            (2, 0),
            (2, 1),
        ]
        assert sum(row.units for row in rows) == 6
        assert sum(float(row.weights_R.sum()) for row in rows) == pytest.approx(6)
        for row in rows:
            assert np.array_equal(row.weights_R > 0, row.loss_mask_R > 0)
            assert np.array_equal(row.engine_R < 0, row.loss_mask_R > 0)


def test_means_and_their_intervals() -> None:
    assert mean_of([0.5]).half_width is None
    mean = mean_of([1.0, 2.0, 3.0])
    assert mean.mean == 2.0 and mean.half_width == pytest.approx(4.303 * 1 / math.sqrt(3), rel=1e-3)
    many = mean_of([0.0, 1.0] * 50)
    assert many.half_width == pytest.approx(1.98422 * math.sqrt(0.25 * 100 / 99 / 100), rel=1e-4)
    known = {2: 4.303, 30: 2.042, 31: 2.0395, 47: 2.0117, 1000: 1.9623}  # from printed tables
    assert {n: student_t(n) for n in known} == pytest.approx(known, abs=1e-4)
