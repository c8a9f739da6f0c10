"""Gathers what the quickstart measured, prints it, and writes ``summary.json``.

python examples/quickstart/summary.py WORK SFT_RUN RL_RUN
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

from megatron_klong.checks.sync import SyncCheckResult
from megatron_klong.config import StrictModel
from megatron_klong.rl.report import RlSummary


class Losses(StrictModel):
    """First and last, of one kind."""

    first: float
    last: float


class QuickstartSummary(StrictModel):
    """The whole quickstart.

    Attributes:
        losses: of supervised training, on train and on held-out trajectories.
        parity: largest difference of a log-prob between implementations of the same weights.
        syncs: largest difference of a log-prob between trainer and server after each sync, in order: those
            of the check, then those of reinforcement learning.
        held_out_grades: mean and half-width of the 95% interval, by iteration: before the first stage, and
            after each.
        rollouts: of reinforcement learning, evaluation included.
        contexts_checked: of them, those whose every prompt was found to be what training uses.
        seconds: by phase; those of a phase that was done before are what looking at it took.
    """

    losses: dict[str, Losses]
    parity: dict[str, float | None]
    syncs: list[float]
    held_out_grades: dict[int, tuple[float, float | None]]
    rollouts: int
    contexts_checked: int
    seconds: dict[str, float]


def gather(work: Path, sft_run: Path, rl_run: Path) -> QuickstartSummary:
    """Read what the phases left behind."""
    losses: dict[str, list[float]] = {}
    for line in (sft_run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        losses.setdefault(record["kind"], []).append(record["loss"])
    check = SyncCheckResult.model_validate_json((work / "sync-check" / "result.json").read_text())
    rl = RlSummary.model_validate_json((rl_run / "summary.json").read_text())
    seconds: Counter[str] = Counter()
    for line in (work / "seconds.tsv").read_text().splitlines():
        name, _, taken = line.partition("\t")
        seconds[name] += int(taken)
    return QuickstartSummary(
        losses={kind: Losses(first=values[0], last=values[-1]) for kind, values in losses.items()},
        parity={
            "megatron_transformers": max(prompt.megatron_transformers or 0.0 for prompt in check.parity),
            "megatron_vllm": max(prompt.megatron_vllm for prompt in check.parity),
        },
        syncs=[sync.difference for sync in check.syncs] + [each.sync_difference for each in rl.iterations],
        held_out_grades={e.iteration: (e.grades.mean, e.grades.half_width) for e in rl.evaluations},
        rollouts=rl.rollouts,
        contexts_checked=rl.contexts_checked,
        seconds=dict(seconds),
    )


def main(work: Path, sft_run: Path, rl_run: Path) -> None:
    """Print and write the summary."""
    summary = gather(work, sft_run, rl_run)
    file = work / "summary.json"
    file.write_text(summary.model_dump_json(indent=1) + "\n")
    for kind, loss in summary.losses.items():
        print(f"{kind} loss         {loss.first:.4f} -> {loss.last:.4f}")
    for pair, difference in summary.parity.items():
        print(f"parity             {pair.replace('_', ' and ')} within {difference:.1e}")
    print(f"syncs              {len(summary.syncs)}, each within {max(summary.syncs):.1e}")
    for iteration, (mean, width) in summary.held_out_grades.items():
        interval = "" if width is None else f" +- {width:.3f}"
        print(f"held-out grade     {mean:.3f}{interval} after iteration {iteration}")
    checked, rollouts = summary.contexts_checked, summary.rollouts
    print(f"contexts           as in the training windows in {checked} of {rollouts} rollouts")
    shown = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary.seconds.items())
    print(f"seconds            {shown}; {sum(summary.seconds.values()):.0f} in all")
    print(f"written to {file}")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
