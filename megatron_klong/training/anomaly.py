"""Steps that went wrong: how they are known, and what is found out about them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
from torch import Tensor

from megatron_klong.config import AnomalyConfig
from megatron_klong.data.rows import PackedRow
from megatron_klong.model.weights import by_global_name
from megatron_klong.training.step import Objective, StepResult, evaluate, forward_backward
from megatron_klong.training.trainer import Trainer

_MAD_TO_DEVIATION = 1.4826
_LEAST_DEVIATION = 0.02
_NAMED_PARAMETERS = 5


@dataclass(frozen=True)
class LossHistory:
    """What is known of the losses so far; part of every checkpoint.

    Attributes:
        phase: whose losses they are.
        losses: the latest, of steps that updated the weights.
        skipped: batches left out in a row.
    """

    phase: str = ""
    losses: tuple[float, ...] = ()
    skipped: int = 0


@dataclass(frozen=True)
class Verdict:
    """What is to be done about a step.

    Attributes:
        action: ``accept``, or a policy of :class:`AnomalyConfig`.
        reason: for a person; None where all is well.
    """

    action: str
    reason: str | None = None


class AnomalyJudge:
    """Decides about every step from its numbers, which are the same on all ranks."""

    def __init__(self, config: AnomalyConfig, history: LossHistory) -> None:
        self._config = config
        self.history = history

    def enter(self, phase: str) -> None:
        """Other data have other losses: a phase is not compared with the one before."""
        if phase != self.history.phase:
            self.history = replace(self.history, phase=phase, losses=())

    def judge(self, result: StepResult) -> Verdict:
        """Judge a step before its update, and remember it."""
        verdict = self._verdict(result)
        if verdict.action in ("accept", "report"):
            losses = (*self.history.losses, result.loss)[-self._config.spike_steps :]
            self.history = replace(self.history, losses=losses, skipped=0)
        elif verdict.action == "skip":
            self.history = replace(self.history, skipped=self.history.skipped + 1)
            if self.history.skipped >= self._config.most_skipped:
                return Verdict(
                    "stop", f"{verdict.reason}; {self.history.skipped} batches in a row were skipped by now"
                )
        return verdict

    def _verdict(self, result: StepResult) -> Verdict:
        if not result.is_finite:
            numbers = f"loss {result.loss} and gradient norm {result.grad_norm} are not both finite"
            return Verdict(self._config.nonfinite, numbers)
        known = self.history.losses
        if len(known) < self._config.spike_steps // 2 or not known:
            return Verdict("accept")
        middle = statistics.median(known)
        spread = statistics.median(abs(loss - middle) for loss in known)
        deviation = max(_MAD_TO_DEVIATION * spread, _LEAST_DEVIATION * abs(middle))
        if result.loss - middle <= self._config.spike_deviations * deviation:
            return Verdict("accept")
        return Verdict(
            self._config.spike,
            f"loss {result.loss:.4f} is far above the {middle:.4f} (deviation {deviation:.4f}) of the last "
            f"{len(known)} steps",
        )


@dataclass(frozen=True)
class RowReport:
    """A row of a bad batch.

    Attributes:
        rank: that computed it (of its data-parallel group's ranks, the first of the last stage).
        loss: per trained token, when computed again.
        samples: trajectory and window of each.
    """

    rank: int
    loss: float
    samples: tuple[tuple[str | int, int], ...]


@dataclass(frozen=True)
class Diagnosis:
    """What computing a bad batch again has shown.

    Attributes:
        rows: all of them, the worst first.
        broken: by rank, parameters whose gradient was not finite there before ranks were summed; a few.
    """

    rows: tuple[RowReport, ...]
    broken: dict[int, tuple[str, ...]]

    def record(self) -> dict[str, Any]:
        """For JSON, which has no NaN: a loss that is none is null."""
        rows = [{**asdict(row), "loss": row.loss if math.isfinite(row.loss) else None} for row in self.rows]
        return {"rows": rows, "broken": self.broken}

    def lines(self) -> list[str]:
        """For a person: the rank, then the rows that stand out, or all alike."""
        bad = [row for row in self.rows if not math.isfinite(row.loss)]
        lines = [
            f"rank {rank}: gradients not finite: {', '.join(names)}" for rank, names in self.broken.items()
        ]
        if not bad and not self.broken:
            lines.append("every row's loss is finite when the batch is computed again")
        for row in bad or self.rows[:3]:
            names = ", ".join(f"{trajectory} window {window}" for trajectory, window in row.samples)
            lines.append(f"rank {row.rank}: a row with loss {row.loss:.4f}: {names or 'no samples'}")
        return lines


def diagnose(
    trainer: Trainer, rows: Sequence[PackedRow], objective: Objective[PackedRow], *, gradients: bool
) -> Diagnosis:
    """Compute a batch again and look at every row on its own; collective, and changes no weights.

    Args:
        gradients: look also for the ranks where gradients are not finite.
    """
    sums: list[float] = []

    def keep(log_probs_R: Tensor, row: PackedRow, mask_R: Tensor) -> Tensor:
        loss = objective(log_probs_R, row, mask_R)
        sums.append(float(loss))
        return loss

    evaluate(trainer, rows, keep)
    own = [
        RowReport(torch.distributed.get_rank(), total / max(row.units, 1), row.samples)
        for total, row in zip(sums, rows)
        if parallel_state.get_tensor_model_parallel_rank() == parallel_state.get_context_parallel_rank() == 0
    ]
    broken = _broken_gradients(trainer, rows, objective) if gradients else ()
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, (own, broken))
    found = [row for reports, _ in gathered for row in reports if row.samples]
    found.sort(key=lambda row: (math.isfinite(row.loss), -row.loss))
    return Diagnosis(tuple(found), _guilty({rank: names for rank, (_, names) in enumerate(gathered)}))


def _guilty(broken: dict[int, tuple[str, ...]]) -> dict[int, tuple[str, ...]]:
    """Without ranks that only hold experts to which others have sent what is broken."""
    own = {rank: tuple(name for name in names if ".experts." not in name) for rank, names in broken.items()}
    chosen = own if any(own.values()) else broken
    return {rank: names[:_NAMED_PARAMETERS] for rank, names in chosen.items() if names}


def _broken_gradients(
    trainer: Trainer, rows: Sequence[PackedRow], objective: Objective[PackedRow]
) -> tuple[str, ...]:
    """Parameters whose gradient is not finite on this rank, before it meets that of other ranks."""
    config = trainer.model.config
    reduce, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    try:
        trainer.model.train()
        trainer.zero_gradients()
        forward_backward(trainer, rows, objective, forward_only=False)
        gradients: dict[str, Tensor] = {
            name: weight.main_grad  # type: ignore[attr-defined]
            for name, weight in trainer.model.named_parameters()
            if weight.requires_grad
        }
        broken = [
            name
            for name, gradient in by_global_name(trainer.model, gradients).items()
            if not bool(torch.isfinite(gradient).all())
        ]
    finally:
        config.finalize_model_grads_func = reduce
        reset_model_temporary_tensors(config, list(trainer.stages))  # what routers have counted
        trainer.zero_gradients()
    return tuple(broken)
