"""What a run writes about itself: ``metrics.jsonl`` and progress lines."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from megatron_klong.training.step import EvaluationResult, StepResult


class MetricsLog:
    """Writes on one rank, does nothing on the others."""

    def __init__(self, file: Path, *, writes: bool, total_steps: int, log_every: int) -> None:
        self._file = file
        self._writes = writes
        self._total_steps = total_steps
        self._log_every = log_every
        self._started = self._last = time.monotonic()
        self._first_step: int | None = None
        self._stream: TextIO | None = None

    def __enter__(self) -> MetricsLog:
        if self._writes:
            self._stream = self._file.open("a", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def say(self, text: str) -> None:
        """A line for the person at the terminal."""
        if self._writes:
            print(text, flush=True)

    def step(self, step: int, result: StepResult) -> None:
        """One optimizer step is done; ``step`` counts from 1."""
        if self._stream is None:
            return
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        if self._first_step is None:
            self._first_step = step - 1
        self._write(
            {
                "kind": "train",
                "step": step,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "learning_rate": result.learning_rate,
                "trained_tokens": result.trained_tokens,
                "tokens": result.tokens,
                "seconds": seconds,
                **_present(prediction_loss=result.prediction_loss, balancing_loss=result.balancing_loss),
            }
        )
        if step % self._log_every == 0 or step in (1, self._total_steps):
            per_step = (now - self._started) / (step - self._first_step)
            left = int(per_step * (self._total_steps - step))
            self.say(
                f"step {step:>5}/{self._total_steps}  loss {result.loss:.4f}  grad {result.grad_norm:.2f}  "
                f"lr {result.learning_rate:.1e}  {result.tokens / seconds:,.0f} tok/s  "
                f"ETA {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            )

    def evaluation(self, step: int, result: EvaluationResult) -> None:
        """The held-out loss after ``step`` steps."""
        if self._stream is None:
            return
        self._write(
            {
                "kind": "validation",
                "step": step,
                "loss": result.loss,
                "trained_tokens": result.trained_tokens,
            }
        )
        self.say(f"step {step:>5}/{self._total_steps}  held-out loss {result.loss:.4f}")
        self.skip_time()

    def finish(self, checkpoint: Path) -> None:
        """The run is complete: where its checkpoint is, and how the losses moved."""
        if self._stream is None:
            return
        losses: dict[str, list[float]] = {}
        for line in self._file.read_text().splitlines():
            record = json.loads(line)
            losses.setdefault(record["kind"], []).append(record["loss"])
        names = {"train": "train loss", "validation": "held-out loss"}
        moved = (f"{names[kind]} {values[0]:.4f} -> {values[-1]:.4f}" for kind, values in losses.items())
        self.say(f"done: {', '.join(moved)}; {checkpoint}")

    def skip_time(self) -> None:
        """What passed since the last step does not count as a step's time."""
        self._last = time.monotonic()

    def _write(self, record: dict[str, object]) -> None:
        assert self._stream is not None
        self._stream.write(json.dumps(record) + "\n")


def _present(**values: float | None) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
