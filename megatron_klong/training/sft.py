"""The supervised fine-tuning loop."""

from __future__ import annotations

import importlib.metadata
import json
import signal
import time
from collections.abc import Mapping, Set
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
from megatron_klong.training.appending import append_line, told_in_one_line
from megatron_klong.training.checkpointing import (
    CheckpointSaver,
    Kept,
    checkpoint_dir,
    load_checkpoint,
    resume_checkpoint,
)
from megatron_klong.training.first_rank import on_first
from megatron_klong.training.initialize import seed_step
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.metrics import RunLog, StepEntry, print_line
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.run_log import open_log
from megatron_klong.training.shared_folder import check_shared
from megatron_klong.training.step import EvaluationResult, Objective, StepResult, evaluate, train_step
from megatron_klong.training.stopping import Stopped, StopRequest, stop_request
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
    check_shared(run.path)
    with watched(run.heartbeats, rank, ranks, config.training.hang_seconds) as watch, stop_request() as stop:
        hf = load_hf_config(config.model.shape)
        sources = build_datasets(config.data, config.run.seed)
        curriculum = Curriculum(config.data, sources, config.training.global_batch_rows, config.run.seed)
        watch.move("building")
        notes: list[str] = []

        def say(text: str) -> None:
            print_line(text)  # at once: the run may end for it
            notes.append(text)

        saved = resume_checkpoint(run.checkpoints, say)
        settings = config.trainer_settings(curriculum.steps)
        trainer = build_trainer(settings, hf, platform, resumes=saved is not None, on_tensor=watch.move)
        trainer.on_row = watch.move
        watch.move("loading")
        progress = SftProgress(0) if saved is None else load_checkpoint(trainer, saved, SftProgress)
        with told_in_one_line(run.metrics):
            evaluated = on_first(lambda: run.truncate_metrics(-1 if saved is None else progress.step))
        with open_log(config, run, progress.step, curriculum.steps, platform) as log:
            for note in (_versions(), *notes):
                log.note(note)
            log.say(_described(config, hf, platform, sources, curriculum))
            if saved is not None:
                log.say(f"resumed from {saved.name}: {curriculum.steps - progress.step} steps to go")
            loop = SftLoop(config, hf, trainer, curriculum, sources, objective, progress, log, watch, stop)
            loop.evaluate_if_due(evaluated)
            number = 0
            while loop.progress.step < curriculum.steps and not (number := stop.heard(trainer.device)):
                loop.step()
                loop.save_if_due()
                loop.evaluate_if_due()
            loop.save()
            if number:
                saved_what = f"saved after step {loop.progress.step}" if loop.progress.step else "not begun"
                log.say(f"{saved_what}; start again to go on")
                raise Stopped(signal.Signals(number))
            log.finish(checkpoint_dir(run.checkpoints, curriculum.steps))


@dataclass
class SftLoop:
    """What the loop does, step by step; every method is collective.

    Attributes:
        hf: the model's shape.
        curriculum: what each step trains on.
        sources: have the held-out data.
        progress: after the steps so far.
        watch: told of all that gets on.
        stop: asked before what takes long.
    """

    config: SftConfig
    hf: DecoderConfig
    trainer: Trainer
    curriculum: Curriculum
    sources: Mapping[str, SourceWindows]
    objective: Objective[PackedRow]
    progress: SftProgress
    log: RunLog
    watch: Watchdog
    stop: StopRequest

    def __post_init__(self) -> None:
        training = self.config.training
        self._run = RunDirectory(self.config.run.dir)
        self._judge = AnomalyJudge(training.anomalies, self.progress.history)
        self._held_out = _held_out_rows(self.config, self.sources)
        self._saved_step = self.progress.step
        kept = Kept(training.keep_last, training.keep_every)
        self._saver = CheckpointSaver(self._run.checkpoints, kept, self.watch.move, self.log.say)

    def step(self) -> None:
        """Train on the next batch.

        Raises:
            RankError: something is wrong with it and the policy is to stop.
        """
        step = self.progress.step + 1
        seed_step(self.config.run.seed, step)
        self._judge.enter(self.curriculum.phase(step).name)
        self.watch.move("data", step)
        with self.log.doing("data"):
            ways = parallel_state.get_data_parallel_world_size()
            batch = self.curriculum.batch(step, parallel_state.get_data_parallel_rank(), ways)
        self.watch.move("training")

        def accepts(result: StepResult) -> bool:
            verdict = self._judge.judge(result)
            if verdict.reason is not None:  # while the weights are those that it happened with
                self._report(step, batch, result, verdict)
            return verdict.action in ("accept", "report")

        result = train_step(self.trainer, batch, self.objective, accepts)
        self.log.step(self._entry(step, result))
        self.progress = SftProgress(step, self._judge.history)

    def evaluate_if_due(self, done: Set[str] = frozenset()) -> None:
        """Held-out losses, source by source, after every ``training.eval_every`` steps and the last one.

        Given up when the run is asked to end before its last step: the next start does it.

        Args:
            done: sources of which an earlier start has recorded it.
        """
        every = self.config.training.eval_every
        sources = [source for source in self._held_out if source not in done]
        if not (sources and every and self._is_due(every)):
            return
        self.watch.move("evaluation")
        results: dict[str, EvaluationResult] = {}
        for source in sources:
            if self.progress.step < self.curriculum.steps and self.stop.heard(self.trainer.device):
                return
            with self.log.doing("evaluation"):
                results[source] = evaluate(self.trainer, self._held_out[source], self.objective)
            with self.log.doing("checkpoint"):
                self._completed(self._saver.poll())
        self.log.evaluation(self.progress.step, results)

    def save_if_due(self) -> None:
        """After every ``training.save_every`` steps and the last one; poll the one under way."""
        self.watch.move("checkpoint")
        with self.log.doing("checkpoint"):
            self._completed(self._saver.poll())
            if self._is_due(self.config.training.save_every):
                self._start_saving()
                if not self.config.training.save_in_background:
                    self._completed(self._saver.finish())

    def save(self) -> None:
        """Save what is not saved, and wait for it."""
        self.watch.move("checkpoint")
        with self.log.doing("checkpoint"):
            if self._saved_step < self.progress.step:
                self._start_saving()
            self._completed(self._saver.finish())

    def _start_saving(self) -> None:
        self._completed(self._saver.finish())
        self._saver.start(self.trainer, self.progress)
        self._saved_step = self.progress.step

    def _completed(self, checkpoint: Path | None) -> None:
        if checkpoint is not None:
            self.log.note(f"checkpoint {checkpoint.name} is complete")

    def _is_due(self, every: int) -> bool:
        step = self.progress.step
        return step == self.curriculum.steps or bool(every and step % every == 0)

    def _entry(self, step: int, result: StepResult) -> StepEntry:
        work = Work(result.tokens, result.attended_pairs, result.trained_tokens)
        prediction = self.config.model.prediction == "train"
        with self.log.doing("log"):
            return StepEntry(
                step=step,
                phase=self.curriculum.phase(step).name,
                samples=self.curriculum.fingerprint(step) if torch.distributed.get_rank() == 0 else "",
                flops=training_flops(self.hf, work, prediction=prediction),
                result=result,
            )

    def _report(self, step: int, batch: list[PackedRow], result: StepResult, verdict: Verdict) -> None:
        """Say what is wrong with a step, with the trajectories of its batch; the policy may end the run."""
        found = diagnose(self.trainer, batch, self.objective, gradients=not result.is_finite)
        self.log.say(f"step {step}: {verdict.reason}: {verdict.action}")
        for line in found.lines():
            self.log.say(f"  {line}")
        record = {"step": step, "time": time.time(), **asdict(verdict), **found.record()}
        with told_in_one_line(self._run.anomalies):
            on_first(lambda: append_line(self._run.anomalies, json.dumps(record)))
        if verdict.action == "stop":
            self._completed(self._saver.finish())  # what is under way is from before this step
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


def _versions() -> str:
    names = ("megatron_klong", "torch", "megatron-core")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)


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
