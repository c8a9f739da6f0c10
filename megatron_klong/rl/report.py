"""What a reinforcement learning run says of itself: lines, a live count, ``metrics.jsonl``, a summary."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pydantic import BaseModel

from megatron_klong.config import RlConfig
from megatron_klong.rl.batches import BatchHeader, read_header
from megatron_klong.rl.exchange import Done, Exchange
from megatron_klong.rl.statistics import Mean, mean_of
from megatron_klong.rollout.journal import Journal, RolloutRecord
from megatron_klong.training.run_directory import RunDirectory, replace_text


class Display(Protocol):
    """Where a person looks."""

    def say(self, text: str) -> None:
        """A line that stays."""
        ...

    def phase(self, what: str, total: int | None) -> AbstractContextManager[Callable[[], None]]:
        """What is being done; the function counts one of ``total`` done."""
        ...


class Evaluation(BaseModel):
    """Held-out tasks, graded under the weights after an iteration; one mean grade for each task."""

    iteration: int
    grades: Mean


class IterationSummary(BaseModel):
    """One iteration."""

    iteration: int
    stage: int
    grades: Mean
    stops: dict[str, int]
    loss: float
    clipped: float
    sync_difference: float


class RlSummary(BaseModel):
    """A whole run, made of its journal and its messages.

    Attributes:
        dropped_groups: with fewer than two graded rollouts.
        contexts_checked: rollouts whose every prompt was compared with the training windows.
        seconds: by phase; without what an interruption cost.
    """

    evaluations: list[Evaluation]
    iterations: list[IterationSummary]
    rollouts: int
    failed_rollouts: int
    dropped_groups: int
    contexts_checked: int
    seconds: dict[str, float]


class RlLog:
    """Writes what happens; the summary is made of what is on disk, so interruptions leave no gap in it."""

    def __init__(self, run: RunDirectory, config: RlConfig, display: Display) -> None:
        self._run = run
        self._config = config
        self._display = display

    def resume(self, iteration: int) -> None:
        """What was written after ``iteration`` comes again; what the trainer said meanwhile is added."""
        self._run.truncate_metrics(iteration)
        done = Exchange(self._run.exchange).heard(f"done-{iteration}", Done)
        if done is not None and not any(
            line["kind"] == "update" and line["step"] == iteration for line in self._lines()
        ):
            self.trained(iteration, done)
        if iteration:
            self._display.say(f"resumed after iteration {iteration}")

    def rolled_out(
        self, iteration: int, stage: int, records: Sequence[RolloutRecord], dropped: int, seconds: float
    ) -> None:
        """An iteration has its rollouts; ``dropped`` groups of them have no baseline."""
        grades, stops = grades_by_task(records), stops_of(records)
        tokens = sum(record.generated_tokens or 0 for record in records)
        self._write("rollouts", iteration, stage=stage, grade=grades.mean, stops=stops, seconds=seconds,
                    rollouts=len(records), dropped_groups=dropped, generated_tokens=tokens)  # fmt: skip
        ended = ", ".join(f"{count} {reason}" for reason, count in stops.items())
        self._display.say(
            f"iteration {iteration:>3}/{self._config.iterations}  stage {stage + 1}  grade {grades}  "
            f"({ended})  {tokens:,} tokens in {seconds:.0f} s"
            + (f"; {dropped} groups dropped: fewer than two grades" if dropped else "")
        )

    def trained(self, iteration: int, done: Done) -> None:
        """A batch is trained on, and its weights are served."""
        self._write("update", iteration, updates=[update.model_dump() for update in done.updates],
                    sync=done.served.model_dump(), seconds=done.seconds)  # fmt: skip

    def evaluated(
        self, iteration: int, records: Sequence[RolloutRecord], checked: int, seconds: float
    ) -> None:
        """The held-out tasks are graded."""
        grades = grades_by_task(records)
        self._write("evaluation", iteration, grade=grades.mean, half_width=grades.half_width,
                    tasks=grades.count, stops=stops_of(records), contexts_checked=checked,
                    seconds=seconds)  # fmt: skip
        self._display.say(
            f"iteration {iteration:>3}/{self._config.iterations}  held-out grade {grades} "
            f"({grades.count} tasks)"
        )

    def summarise(self, journal: Journal) -> None:
        """Write ``summary.json``."""
        summary = self._summary(journal)
        replace_text(self._run.summary, summary.model_dump_json(indent=1) + "\n")
        moved = " -> ".join(str(evaluation.grades) for evaluation in summary.evaluations)
        self._display.say(
            f"done: held-out grade {moved or 'not taken'}; {summary.rollouts} rollouts, "
            f"{summary.contexts_checked} with every context as trained; {self._run.summary}"
        )

    def _summary(self, journal: Journal) -> RlSummary:
        exchange = Exchange(self._run.exchange)
        evaluations, iterations, records = [], [], []
        for iteration in range(self._config.iterations + 1):
            graded = journal.rollouts("evaluation", iteration)
            if graded:
                evaluations.append(Evaluation(iteration=iteration, grades=grades_by_task(graded)))
            trained = journal.rollouts("train", iteration)
            done = exchange.heard(f"done-{iteration}", Done)
            if trained and done is not None:
                last = done.updates[-1]
                iterations.append(
                    IterationSummary(
                        iteration=iteration, stage=trained[0].stage, grades=grades_by_task(trained),
                        stops=stops_of(trained), loss=last.loss,
                        clipped=last.clipped, sync_difference=done.served.difference,
                    )
                )  # fmt: skip
            records += graded + trained
        checked, seconds = self._measured()
        return RlSummary(
            evaluations=evaluations, iterations=iterations, rollouts=len(records),
            failed_rollouts=sum(record.score is None for record in records),
            dropped_groups=sum(header.dropped_groups for header in self._headers()),
            contexts_checked=checked, seconds=seconds,
        )  # fmt: skip

    def _headers(self) -> list[BatchHeader]:
        return [read_header(self._run.batches, n) for n in range(1, self._config.iterations + 1)]

    def _measured(self) -> tuple[int, dict[str, float]]:
        """Rollouts whose contexts were checked, and seconds by phase.

        An evaluation that was interrupted is counted with the seconds of its last part, and checked whole.
        """
        checked = sum(header.checked for header in self._headers())
        checks: dict[int, int] = {}
        seconds: defaultdict[str, float] = defaultdict(float)
        for line in self._lines():
            checks[line["step"]] = line.get("contexts_checked", checks.get(line["step"], 0))
            sync = line["sync"]["seconds"] if line["kind"] == "update" else 0.0
            name = "training" if line["kind"] == "update" else line["kind"]
            seconds[name] += line["seconds"] - sync
            if sync:
                seconds["sync"] += sync
        return checked + sum(checks.values()), dict(seconds)

    def _lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._run.metrics.read_text().splitlines()]

    def _write(self, kind: str, iteration: int, **values: Any) -> None:
        with self._run.metrics.open("a") as stream:
            stream.write(json.dumps({"kind": kind, "step": iteration, **values}) + "\n")


def grades_by_task(records: Sequence[RolloutRecord]) -> Mean:
    """The mean over tasks of the mean grade of their rollouts; rollouts of a task are not independent."""
    scores: dict[str, list[float]] = {}
    for record in records:
        if record.score is not None:
            scores.setdefault(record.task_id, []).append(record.score)
    return mean_of([sum(given) / len(given) for given in scores.values()])


def stops_of(records: Sequence[RolloutRecord]) -> dict[str, int]:
    """How many rollouts ended why; failures of infrastructure among them."""
    return dict(Counter(str(record.stop or "failed") for record in records).most_common())
