"""The supervised fine-tuning loop."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from megatron.core import parallel_state

from megatron_klong.config import SftConfig
from megatron_klong.data.curriculum import Curriculum
from megatron_klong.data.dataset import SourceWindows, build_datasets
from megatron_klong.data.rows import PackedRow, PackedRows
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.flops import Work, training_flops
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.parameters import parameter_counts
from megatron_klong.platform import Platform
from megatron_klong.training.anomaly import AnomalyJudge, LossHistory, Verdict, diagnose
from megatron_klong.training.checkpointing import (
    CheckpointSaver,
    Kept,
    checkpoint_dir,
    load_checkpoint,
    resume_checkpoint,
)
from megatron_klong.training.initialize import seed_step
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.metrics import RunLog, StepEntry, print_line
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.run_log import open_log
from megatron_klong.training.step import EvaluationResult, Objective, StepResult, evaluate, train_step
from megatron_klong.training.stopping import Stopped, stop_request
from megatron_klong.training.trainer import Trainer, build_trainer
from megatron_klong.training.watchdog import Watchdog, watched


@dataclass(frozen=True)
class SftProgress:
    """Where a supervised run stands; what a step trains on follows from its number.

    Attributes:
        step: optimizer steps done.
        history: of losses, that the next ones are compared with.
    """

    step: int
    history: LossHistory = field(default_factory=LossHistory)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> SftProgress:
        """As it was saved."""
        return cls(saved["step"], LossHistory(**saved["history"]))


def run_sft(config: SftConfig, platform: Platform, objective: Objective[PackedRow] = sft_objective) -> None:
    """Train from the last checkpoint of the run directory, or from the start, to the last step.

    Raises:
        Stopped: a signal asked for the end, and the run has saved.
        RankError: a step went wrong and the policy is to stop, or a checkpoint could not be written.
    """
    run = RunDirectory(config.run.dir)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with watched(run.heartbeats, rank, ranks, config.training.hang_seconds) as watch, stop_request() as stop:
        hf = load_hf_config(config.model.shape)
        sources = build_datasets(config.data, config.run.seed)
        curriculum = Curriculum(config.data, sources, config.training.global_batch_rows, config.run.seed)
        watch.move("building")
        trainer = build_trainer(config.trainer_settings(curriculum.steps), hf, platform)
        trainer.on_row = watch.move
        watch.move("loading")
        saved = resume_checkpoint(run.checkpoints, print_line)
        progress = SftProgress(0) if saved is None else load_checkpoint(trainer, saved, SftProgress)
        if rank == 0:
            run.truncate_metrics(-1 if saved is None else progress.step)
        with open_log(config, run, progress.step, curriculum.steps, platform) as log:
            log.say(_described(config, hf, platform, sources, curriculum))
            if saved is not None:
                log.say(f"resumed from {saved.name}: {curriculum.steps - progress.step} steps to go")
            loop = SftLoop(config, hf, trainer, curriculum, sources, objective, progress, log, watch)
            if saved is None:
                loop.evaluate()
            while loop.progress.step < curriculum.steps:
                loop.step()
                loop.evaluate_if_due()
                number = stop.heard(trainer.device)
                loop.save_if_due(at_once=bool(number))
                if number:
                    log.say(f"saved after step {loop.progress.step}; start again to go on")
                    raise Stopped(signal.Signals(number))
            loop.saver.finish()
            log.finish(checkpoint_dir(run.checkpoints, curriculum.steps))


class SftLoop:
    """What the loop does, step by step; every method is collective.

    Attributes:
        progress: after the steps so far.
    """

    def __init__(
        self,
        config: SftConfig,
        hf: DecoderConfig,
        trainer: Trainer,
        curriculum: Curriculum,
        sources: Mapping[str, SourceWindows],
        objective: Objective[PackedRow],
        progress: SftProgress,
        log: RunLog,
        watch: Watchdog,
    ) -> None:
        self._config = config
        self._hf = hf
        self._trainer = trainer
        self._curriculum = curriculum
        self._objective = objective
        self._log = log
        self._watch = watch
        self._run = RunDirectory(config.run.dir)
        self._judge = AnomalyJudge(config.training.anomalies, progress.history)
        self._held_out = _held_out_rows(config, sources)
        self.progress = progress
        self.saver = CheckpointSaver(
            self._run.checkpoints, Kept(config.training.keep_last, config.training.keep_every), watch.move
        )

    def step(self) -> None:
        """Train on the next batch.

        Raises:
            RankError: something is wrong with it and the policy is to stop.
        """
        step = self.progress.step + 1
        seed_step(self._config.run.seed, step)
        self._judge.enter(self._curriculum.phase(step).name)
        self._watch.move("data", step)
        with self._log.doing("data"):
            ways = parallel_state.get_data_parallel_world_size()
            batch = self._curriculum.batch(step, parallel_state.get_data_parallel_rank(), ways)
        self._watch.move("training")

        def accepts(result: StepResult) -> bool:
            verdict = self._judge.judge(result)
            if verdict.reason is not None:  # while the weights are those that it happened with
                self._report(step, batch, result, verdict)
            return verdict.action in ("accept", "report")

        result = train_step(self._trainer, batch, self._objective, accepts)
        self._log.step(self._entry(step, result))
        self.progress = SftProgress(step, self._judge.history)

    def evaluate(self) -> None:
        """Held-out losses, source by source."""
        if not (self._held_out and self._config.training.eval_every):
            return
        self._watch.move("evaluation")
        results: dict[str, EvaluationResult] = {}
        with self._log.doing("evaluation"):
            for source, rows in self._held_out.items():
                results[source] = evaluate(self._trainer, rows, self._objective)
        self._log.evaluation(self.progress.step, results)

    def evaluate_if_due(self) -> None:
        """After every ``training.eval_every`` steps and the last one."""
        if self._is_due(self._config.training.eval_every):
            self.evaluate()

    def save_if_due(self, *, at_once: bool) -> None:
        """After every ``training.save_every`` steps, the last one, and where the run is to end at once."""
        self._watch.move("checkpoint")
        with self._log.doing("checkpoint"):
            self.saver.poll()
            if self._is_due(self._config.training.save_every) or at_once:
                self.saver.start(self._trainer, self.progress)
                if at_once or not self._config.training.save_in_background:
                    self.saver.finish()

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step == self._curriculum.steps or bool(every and step % every == 0)

    def _entry(self, step: int, result: StepResult) -> StepEntry:
        work = Work(result.tokens, result.attended_pairs, result.trained_tokens)
        prediction = self._config.model.prediction == "train"
        with self._log.doing("log"):
            return StepEntry(
                step=step,
                phase=self._curriculum.phase(step).name,
                samples=self._curriculum.fingerprint(step) if torch.distributed.get_rank() == 0 else "",
                flops=training_flops(self._hf, work, prediction=prediction),
                result=result,
            )

    def _report(self, step: int, batch: list[PackedRow], result: StepResult, verdict: Verdict) -> None:
        """Say what is wrong with a step, with the trajectories of its batch; the policy may end the run."""
        found = diagnose(self._trainer, batch, self._objective, gradients=not result.is_finite)
        self._log.say(f"step {step}: {verdict.reason}: {verdict.action}")
        for line in found.lines():
            self._log.say(f"  {line}")
        if torch.distributed.get_rank() == 0:
            record = {"step": step, "time": time.time(), **asdict(verdict), **found.record()}
            with self._run.anomalies.open("a") as stream:
                stream.write(json.dumps(record) + "\n")
        if verdict.action == "stop":
            self.saver.finish()  # what is under way is from before this step
            raise RankError(
                f"step {step}: {verdict.reason}; the batch is described in {self._run.anomalies}. Start "
                "again to go on from the last checkpoint, with training.anomalies.nonfinite=skip (or "
                "spike=skip) to leave that batch out; or lower optimizer.lr, in another run.dir"
            )


def _held_out_rows(config: SftConfig, sources: Mapping[str, SourceWindows]) -> dict[str, list[PackedRow]]:
    """By source, this rank's part of the first rows of its held-out data, filled up with empty rows.

    All ranks need equally many, as many as their stages can take: expert-parallel ranks of different
    data-parallel ranks meet in every layer.
    """
    rank, ways = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    found = {}
    for name, source in sources.items():
        if source.validation is not None:
            rows = PackedRows(source.validation, config.data.row_length, 0, passes=1)
            count = min(config.training.eval_rows, rows.total)
            multiple = ways * config.parallel.micro_batch_divisor
            padded = -(-count // multiple) * multiple
            found[name] = [
                rows.row(place) if place < count else rows.empty for place in range(rank, padded, ways)
            ]
    return found


def _described(
    config: SftConfig,
    hf: DecoderConfig,
    platform: Platform,
    sources: Mapping[str, SourceWindows],
    curriculum: Curriculum,
) -> str:
    layout = config.parallel.described(torch.distributed.get_world_size())
    windows = ", ".join(f"{name} {_windows(source)}" for name, source in sources.items())
    steps = ", ".join(f"{phase.name} {phase.steps}" for phase in curriculum.phases)
    rows = f"{config.training.global_batch_rows} rows of {config.data.row_length} tokens"
    return (
        f"{parameter_counts(hf).total:,} parameters on {platform.name}, {layout}; windows: {windows}; "
        f"steps: {steps}, of {rows}"
    )


def _windows(source: SourceWindows) -> str:
    held_out = 0 if source.validation is None else len(source.validation.lengths)
    return f"{len(source.train.lengths)} + {held_out} held out"
