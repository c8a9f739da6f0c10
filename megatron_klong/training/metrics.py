"""What a run says: ``metrics.jsonl``, lines and a live bar for a person, and other places to log to."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from megatron_klong.training.appending import append_line, told_in_one_line
from megatron_klong.training.sinks import Sink
from megatron_klong.training.step import EvaluationResult, StepResult

Doing = Literal["data", "checkpoint", "log", "evaluation"]
"""What a run does beside its steps."""


@dataclass(frozen=True)
class Speed:
    """How work is turned into a utilization.

    Attributes:
        devices: of the run.
        peak_tflops: of each; None where it is not known.
    """

    devices: int
    peak_tflops: float | None


@dataclass(frozen=True)
class StepEntry:
    """What is written of a step.

    Attributes:
        step: counted from 1.
        samples: fingerprint of what it trained on.
        flops: that its mathematics needs.
    """

    step: int
    phase: str
    samples: str
    flops: int
    result: StepResult


class RunLog:
    """Writes on one rank, does nothing on the others.

    Args:
        file: of numbers, a JSON object a line.
        said: of lines for a person, with the time of each.

    Raises:
        RankError: by :meth:`step` and :meth:`evaluation`: a line could not be written to ``file``.
    """

    def __init__(
        self,
        file: Path,
        said: Path,
        *,
        writes: bool,
        total_steps: int,
        log_every: int,
        speed: Speed,
        sinks: Sequence[Sink] = (),
    ) -> None:
        self._file = file
        self._said = said
        self._writes = writes
        self._total_steps = total_steps
        self._log_every = log_every
        self._speed = speed
        self._sinks = list(sinks)
        self._last = time.monotonic()
        self._beside = _no_seconds()  # since the last step
        self._sums = _no_seconds()  # since the start
        self._steps = 0
        self._stack = ExitStack()

    def __enter__(self) -> RunLog:
        if self._writes:
            self._console = Console()
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self._bar = self._stack.enter_context(
                Progress(
                    *columns, console=self._console, transient=True, disable=not self._console.is_terminal
                )
            )
            self._task = self._bar.add_task("first step", total=self._total_steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal, and in the file of lines."""
        if not self._writes:
            return
        self.note(text)
        if self._console.is_terminal:
            with suppress(OSError):
                self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print_line(text)

    def note(self, text: str) -> None:
        """A line in the file of lines alone."""
        if self._writes:
            with suppress(OSError):  # it is not worth the run
                append_line(self._said, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    @contextmanager
    def doing(self, what: Doing) -> Iterator[None]:
        """Within, the time is not that of a step."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._beside[what] += time.monotonic() - start

    def step(self, entry: StepEntry) -> None:
        """One optimizer step is done."""
        now = time.monotonic()
        beside, self._beside = self._beside, _no_seconds()
        seconds = now - self._last - sum(beside.values())
        self._last = now
        self._steps += 1
        for what, taken in {"step": seconds, **beside}.items():
            self._sums[what] += taken
        if not self._writes:
            return
        with self.doing("log"):
            self._write(entry, seconds, beside)

    def evaluation(self, step: int, results: Mapping[str, EvaluationResult]) -> None:
        """Held-out losses of every source after ``step`` steps."""
        if not self._writes:
            return
        for source, result in results.items():
            values = {**_numbers(loss=result.loss), "trained_tokens": result.trained_tokens}
            self._record(
                "validation", step, {"source": source, **values}, {f"held_out/{source}/loss": result.loss}
            )
        shown = "  ".join(f"{source} {result.loss:.4f}" for source, result in results.items())
        self.say(f"step {step:>5}/{self._total_steps}  held-out loss {shown}")

    def finish(self, checkpoint: Path) -> None:
        """The run is complete: where its checkpoint is, how the losses moved, and where the time went."""
        if not self._writes:
            return
        losses: dict[str, list[float]] = {}
        for line in self._file.read_text().splitlines():
            record = json.loads(line)
            name = f"held-out loss of {record['source']}" if record["kind"] == "validation" else "train loss"
            if record["loss"] is not None:
                losses.setdefault(name, []).append(record["loss"])
        moved = (f"{name} {values[0]:.4f} -> {values[-1]:.4f}" for name, values in losses.items())
        if self._steps:
            self.say(self._times())
        self.say(f"done: {', '.join(moved)}; {checkpoint}")

    def _times(self) -> str:
        sums = {what: taken + self._beside[what] for what, taken in self._sums.items()}
        whole = sum(sums.values())
        shares = ", ".join(
            f"{what} {sums.get(what, 0) / whole:.1%}" for what in ("checkpoint", "data", "log", "evaluation")
        )
        return f"{self._steps} steps in {whole:,.0f} s; beside them: {shares}"

    def _write(self, entry: StepEntry, seconds: float, beside: Mapping[str, float]) -> None:
        result = entry.result
        tflops = entry.flops / seconds / self._speed.devices / 1e12
        peak = self._speed.peak_tflops
        values: dict[str, float | None] = {
            **_numbers(loss=result.loss, grad_norm=result.grad_norm),
            "learning_rate": result.learning_rate,
            "trained_tokens": result.trained_tokens,
            "tokens": result.tokens,
            "updated": result.updated,
            "seconds": seconds,
            "data_seconds": beside["data"],
            "checkpoint_seconds": beside["checkpoint"],
            "log_seconds": beside["log"],
            "tflops": tflops,
            **({"mfu": tflops / peak} if peak else {}),
            **_present(prediction_loss=result.prediction_loss, balancing_loss=result.balancing_loss),
        }
        named = {f"train/{name}": float(value) for name, value in values.items() if value is not None}
        self._record("train", entry.step, {"phase": entry.phase, "samples": entry.samples, **values}, named)
        line = self._line(entry, seconds, tflops)
        self._bar.update(self._task, completed=entry.step, description=line)
        if entry.step % self._log_every == 0 or entry.step in (1, self._total_steps):
            self.say(line)

    def _line(self, entry: StepEntry, seconds: float, tflops: float) -> str:
        result, peak = entry.result, self._speed.peak_tflops
        left = int(sum(self._sums.values()) / self._steps * (self._total_steps - entry.step))
        speed = f"MFU {tflops / peak:.1%}" if peak else f"{tflops:.2g} TFLOP/s"
        return (
            f"step {entry.step:>5}/{self._total_steps}  loss {result.loss:.4f}  grad {result.grad_norm:.2f}  "
            f"lr {result.learning_rate:.1e}  {result.tokens / seconds:,.0f} tok/s  {speed}  "
            f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        )

    def _record(
        self, kind: str, step: int, record: Mapping[str, object], values: Mapping[str, float]
    ) -> None:
        with told_in_one_line(self._file):
            append_line(self._file, json.dumps({"kind": kind, "step": step, **record}))
        for sink in list(self._sinks):
            try:
                sink.log(step, values)
            except Exception as error:  # a place to look at numbers is not worth the run
                self._sinks.remove(sink)
                self.say(f"logging to {sink.name} failed and is given up: {error}")


def print_line(text: str) -> None:
    """On stdout; whoever listened may be gone, and the run goes on."""
    with suppress(OSError):
        print(text, flush=True)


def _no_seconds() -> defaultdict[str, float]:
    return defaultdict(float)


def _numbers(**values: float) -> dict[str, float | None]:
    """JSON has no NaN: null stands for it."""
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _present(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
