"""Steps that go wrong: known from their numbers, traced to rank and trajectory, answered by policy."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_klong.config import AnomalyConfig, ParallelConfig, SftConfig, load_config
from megatron_klong.data.rows import PackedRow
from megatron_klong.platform import Platform
from megatron_klong.training.anomaly import AnomalyJudge, LossHistory
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.sft import run_sft
from megatron_klong.training.step import StepResult
from tests.ranks import RankPool

ROOT = Path(__file__).parents[1]


def result(loss: float, grad_norm: float = 1.0) -> StepResult:
    return StepResult(
        loss=loss, trained_tokens=1, tokens=1, attended_pairs=1, grad_norm=grad_norm, learning_rate=1.0
    )  # fmt: skip


def actions(losses: list[float], **config: Any) -> list[str]:
    judge = AnomalyJudge(AnomalyConfig(**config), LossHistory())
    return [judge.judge(result(loss)).action for loss in losses]


@pytest.mark.parametrize("policy", ["skip", "stop"])
@pytest.mark.parametrize("numbers", [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_no_number_meets_the_policy(policy: Any, numbers: tuple[float, float]) -> None:
    judge = AnomalyJudge(AnomalyConfig(nonfinite=policy), LossHistory())
    verdict = judge.judge(result(*numbers))
    assert verdict.action == policy and verdict.reason is not None and "not both finite" in verdict.reason
    assert judge.history.losses == ()


def test_a_spike_is_known_by_the_median_and_spread_of_the_losses_before_it() -> None:
    # Median 2.0; the deviations from it have the median 0.1, so 5 deviations are 5 * 1.4826 * 0.1 = 0.7413.
    known = [1.8, 1.9, 2.0, 2.1, 2.2]
    assert actions([*known, 2.74], spike="skip", spike_steps=10, spike_deviations=5)[-1] == "accept"
    assert actions([*known, 2.75], spike="skip", spike_steps=10, spike_deviations=5)[-1] == "skip"
    assert actions([*known, 0.1], spike="skip", spike_steps=10, spike_deviations=5)[-1] == "accept"
    # A loss that stands still has no spread: 2% of it count as one deviation.
    assert actions([2.0] * 5 + [2.19], spike="stop", spike_steps=10, spike_deviations=5)[-1] == "accept"
    assert actions([2.0] * 5 + [2.21], spike="stop", spike_steps=10, spike_deviations=5)[-1] == "stop"


def test_the_first_losses_are_not_judged_and_a_skipped_one_is_not_remembered() -> None:
    assert actions([9.0, 1.0, 50.0], spike="skip", spike_steps=8) == ["accept"] * 3
    judge = AnomalyJudge(AnomalyConfig(spike="skip", spike_steps=4), LossHistory())
    for loss in (1.0, 1.0, 99.0, 1.0, 1.0, 1.0):
        judge.judge(result(loss))
    assert judge.history == LossHistory("", (1.0, 1.0, 1.0, 1.0), 0)


def test_another_phase_is_not_compared_with_the_one_before() -> None:
    judge = AnomalyJudge(AnomalyConfig(spike="stop", spike_steps=4), LossHistory())
    judge.enter("general")
    for _ in range(4):
        judge.judge(result(1.0))
    judge.enter("agent")
    assert judge.judge(result(3.0)).action == "accept"


def test_too_many_skipped_in_a_row_stop() -> None:
    assert actions([math.nan] * 3, nonfinite="skip", most_skipped=3) == ["skip", "skip", "stop"]
    assert actions([math.nan, 1.0, math.nan, math.nan], nonfinite="skip", most_skipped=3)[-1] == "skip"


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=30), st.integers(0, 29))
def test_a_resumed_judge_says_what_the_first_would_have_said(losses: list[float], cut: int) -> None:
    config = AnomalyConfig(spike="skip", spike_steps=6, spike_deviations=2)
    whole = AnomalyJudge(config, LossHistory())
    expected = [whole.judge(result(loss)) for loss in losses]
    first = AnomalyJudge(config, LossHistory())
    said = [first.judge(result(loss)) for loss in losses[:cut]]
    saved = json.loads(json.dumps(vars(first.history)))
    second = AnomalyJudge(config, LossHistory(**{**saved, "losses": tuple(saved["losses"])}))
    said += [second.judge(result(loss)) for loss in losses[cut:]]
    assert said == expected


class Poison:
    """An objective that goes wrong for one data-parallel rank at one step, as a broken device would."""

    def __init__(self, rank: int, step: int, rows: int, how: str) -> None:
        self._rank, self._step, self._rows, self._how = rank, step, rows, how
        self._calls = 0

    def __call__(self, log_probs_R: Tensor, row: PackedRow, mask_R: Tensor) -> Tensor:
        loss = sft_objective(log_probs_R, row, mask_R)
        if not torch.is_grad_enabled():
            return loss * math.nan if self._active and self._how == "loss" else loss
        self._calls += 1
        if not self._active:
            return loss
        return loss * math.nan if self._how == "loss" else _BrokenBackward.apply(loss)

    @property
    def _active(self) -> bool:
        step = -(-self._calls // self._rows) if torch.is_grad_enabled() else self._calls // self._rows
        return torch.distributed.get_rank() == self._rank and step >= self._step


class _BrokenBackward(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


def run_on_rank(
    platform: Platform, config: SftConfig, poison: tuple[int, int, int, str] | None
) -> str | None:
    """A whole run; the error that ended it."""
    objective: Callable[..., Tensor] = Poison(*poison) if poison else sft_objective
    try:
        run_sft(config, platform, objective)
    except RankError as error:
        return str(error)
    return None


def sft_config(store: Path, run: Path, *overrides: str) -> SftConfig:
    (run / "logs").mkdir(parents=True)
    return load_config(
        SftConfig, ROOT / "examples" / "quickstart" / "sft.yaml",
        [
            f"data.sources.replication.store={store}", f"run.dir={run}", "data.validation_fraction=0",
            "data.phases.train.steps=5", "training.global_batch_rows=4", "optimizer.warmup_steps=1",
            "training.save_every=2", *overrides,
        ],
    )  # fmt: skip


DP2 = ParallelConfig(expert=2, nproc=2)
LAYOUT = ("parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2", "parallel.nproc=2")


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_rank_with_nan_is_named_with_its_trajectories_and_the_run_stops(
    ranks: RankPool, domain_store: Path, tmp_path: Path, how: str
) -> None:
    config = sft_config(domain_store, tmp_path / "run", *LAYOUT)
    errors = ranks.run(run_on_rank, DP2, 2, config=config, poison=(1, 4, 2, how))
    assert errors[0] == errors[1] is not None
    assert "step 4: loss" in errors[0] and "not both finite" in errors[0]
    run = RunDirectory(tmp_path / "run")
    (record,) = [json.loads(line) for line in run.anomalies.read_text().splitlines()]
    assert (record["step"], record["action"]) == (4, "stop")
    assert (
        list(record["broken"]) == ["1"] and record["broken"]["1"]
    )  # and not rank 0, whose gradients are well
    assert {row["rank"] for row in record["rows"]} == {0, 1}
    assert all(name.startswith("replication/") for row in record["rows"] for name, _ in row["samples"])
    if how == "loss":
        assert {row["rank"] for row in record["rows"] if row["loss"] is None} == {1}
    steps = [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()]
    assert steps == [1, 2, 3]
    assert [path.name for path in run.checkpoints.glob("step_*")] == ["step_00000002"]


def test_a_skipped_batch_leaves_the_weights_and_the_run_goes_on(
    ranks: RankPool, domain_store: Path, tmp_path: Path
) -> None:
    skipping = sft_config(
        domain_store, tmp_path / "run", *LAYOUT, "training.anomalies.nonfinite=skip", "training.save_every=1",
        "training.keep_last=9", "training.anomalies.most_skipped=2",
    )  # fmt: skip
    errors = ranks.run(run_on_rank, DP2, 2, config=skipping, poison=(1, 4, 2, "loss"))
    assert errors[0] is not None and "2 batches in a row were skipped by now" in errors[0]
    run = RunDirectory(tmp_path / "run")
    lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert [(line["step"], line["updated"]) for line in lines] == [
        (1, True),
        (2, True),
        (3, True),
        (4, False),
    ]
    assert lines[3]["loss"] is None
    weights = [ranks.run(weights_of, DP2, 2, config=skipping, step=step)[0] for step in (2, 3, 4)]
    assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[0], weights[1])


def weights_of(platform: Platform, config: SftConfig, step: int) -> Tensor:
    from megatron_klong.model.hf_config import load_hf_config
    from megatron_klong.training.checkpointing import checkpoint_dir, load_checkpoint
    from megatron_klong.training.sft import SftProgress
    from megatron_klong.training.trainer import build_trainer

    trainer = build_trainer(config.trainer_settings(5), load_hf_config(config.model.shape), platform)
    progress = load_checkpoint(
        trainer, checkpoint_dir(RunDirectory(config.run.dir).checkpoints, step), SftProgress
    )
    assert progress.step == step
    return torch.cat([weight.detach().flatten() for weight in trainer.model.parameters()])


def test_a_spike_is_reported_with_its_worst_rows_first(
    ranks: RankPool, domain_store: Path, tmp_path: Path
) -> None:
    """Any rise is a spike here: the rate is so high that the loss jumps about."""
    config = sft_config(
        domain_store, tmp_path / "run", *LAYOUT, "training.anomalies.spike_steps=2",
        "training.anomalies.spike_deviations=1e-6", "optimizer.lr=1.0", "optimizer.min_lr=1.0",
    )  # fmt: skip
    assert ranks.run(run_on_rank, DP2, 2, config=config, poison=None) == [None, None]
    run = RunDirectory(tmp_path / "run")
    records = [json.loads(line) for line in run.anomalies.read_text().splitlines()]
    losses = [json.loads(line)["loss"] for line in run.metrics.read_text().splitlines()]
    assert {record["step"] for record in records} == {
        number + 1
        for number in range(1, 5)
        if losses[number] > sum(losses[max(0, number - 2) : number]) / min(number, 2)
    }  # the median of two is their mean
    assert records and all(record["action"] == "report" and record["broken"] == {} for record in records)
    for record in records:
        found = [row["loss"] for row in record["rows"]]
        assert found == sorted(found, reverse=True) and all(map(math.isfinite, found))
