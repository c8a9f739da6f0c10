"""Does reinforcement learning improve grades on fresh tasks, and is it the grades that do it?

Runs ``klong rl CONFIG`` once for each seed with the grades as they are, and once with the grades of each
group shuffled among its rollouts, all else equal. Compares the held-out grades before the first iteration
and after the last, and gives the mean change over seeds with its 95% interval (Student's t), and that of the
difference between the two, paired by seed.

    python -m benchmarks.rl_improvement examples/quickstart/rl.yaml --out runs/rl-improvement \\
        [--seeds 1,2,3] [KEY=VALUE ...]

Started again with the same ``--out``, it goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from pathlib import Path

from megatron_klong.rl.report import RlSummary
from megatron_klong.rl.statistics import mean_of


def main() -> int:
    """Run what is missing, print the table, write ``result.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3", help="comma-separated")
    arguments = parser.parse_intermixed_args()
    changes: dict[str, list[float]] = {"grades": [], "shuffled": []}
    for seed in map(int, arguments.seeds.split(",")):
        for kind in changes:
            summary = _run(
                arguments.config, arguments.out / f"{kind}-{seed}", seed, kind, arguments.overrides
            )
            first, *_, last = (evaluation.grades.mean for evaluation in summary.evaluations)
            changes[kind].append(last - first)
            shown = " -> ".join(str(evaluation.grades) for evaluation in summary.evaluations)
            print(f"{kind:<9} seed {seed}: held-out grade {shown}; change {last - first:+.3f}", flush=True)
    changes["difference"] = [a - b for a, b in zip(changes["grades"], changes["shuffled"])]
    results = {kind: mean_of(values) for kind, values in changes.items()}
    for kind, mean in results.items():
        if mean.half_width is None:
            print(f"{kind:<10} change {mean.mean:+.3f}; one seed gives no interval")
            continue
        verdict = "above 0 by more" if mean.mean > mean.half_width else "not above 0 by more"
        print(
            f"{kind:<10} mean change over {mean.count} seeds {mean.mean:+.3f} +- {mean.half_width:.3f}: "
            f"{verdict} than its interval"
        )
    record = {
        "command": sys.argv, "machine": platform.processor() or platform.machine(), "changes": changes,
        "means": {kind: mean.model_dump() for kind, mean in results.items()},
    }  # fmt: skip
    (arguments.out / "result.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


def _run(config: Path, folder: Path, seed: int, kind: str, overrides: list[str]) -> RlSummary:
    start = time.monotonic()
    command = [
        sys.executable, "-m", "megatron_klong.cli", "rl", str(config), f"run.dir={folder}",
        f"run.seed={seed}",
        f"rollout.shuffle_grades={str(kind == 'shuffled').lower()}", *overrides,
    ]  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / f"{folder.name}.log").open("a") as log:
        subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=True)
    print(f"{folder} in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    return RlSummary.model_validate_json((folder / "summary.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
