"""Does a run that is interrupted again and again train on the same data, with the same losses?

    python -m benchmarks.interruptions --out DIR [--count 20] [--steps 60] [--seed 0] [KEY=VALUE]...

Runs `klong sft` twice on the data of the quickstart: once undisturbed, and once interrupted at random
moments, by SIGTERM to the launcher, by `kill -9` of one rank, and by `kill -9` of launcher and ranks. Then
compares every step's loss, gradient norm and samples, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import psutil

Way = Literal["SIGTERM to the launcher", "kill -9 of one rank", "kill -9 of all"]
WAYS: tuple[Way, ...] = get_args(Way)

_KLONG = (sys.executable, "-W", "ignore", "-m", "megatron_klong.cli")
_CODES: dict[Way, int] = {WAYS[0]: 143, WAYS[1]: 1, WAYS[2]: -9}


@dataclass(frozen=True)
class Comparison:
    """An undisturbed run beside an interrupted one.

    Attributes:
        steps: of each.
        different: steps whose loss, gradient norm or samples are not the same bits.
        repeated: trained steps that the interrupted run has recorded more than once or not at all.
    """

    steps: int
    different: tuple[int, ...]
    repeated: tuple[int, ...]


def start(config: Sequence[str], run: Path) -> subprocess.Popen[str]:
    """`klong sft` with these settings."""
    return subprocess.Popen(
        [*_KLONG, "sft", *config, f"run.dir={run}", "log.every=1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(config: Sequence[str], run: Path) -> str:
    """Run to the end; what it said."""
    process = start(config, run)
    said, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"exit code {process.returncode}: {said[-2000:]}{errors[-2000:]}")
    return said


def interrupt(
    config: Sequence[str], run: Path, way: Way, steps: int, delay: float, victim: random.Random
) -> int:
    """Start a run, let it take so many steps, end it; the last step that it had said, 0 where it said none.

    Returns early where the run is complete before.
    """
    process = start(config, run)
    last = 0
    for step in _steps(process):
        last, steps = step, steps - 1
        if steps <= 0:
            break
    else:
        process.communicate()
        return last
    time.sleep(delay)
    launcher = psutil.Process(process.pid)
    ranks = launcher.children()
    if way == "SIGTERM to the launcher":
        process.send_signal(signal.SIGTERM)
    elif way == "kill -9 of one rank":
        victim.choice(ranks).kill()
    else:
        for each in (launcher, *ranks):
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
    process.communicate()
    psutil.wait_procs(ranks)
    if process.returncode not in (_CODES[way], 0):  # 0: it was at its end already
        raise RuntimeError(f"{way}: exit code {process.returncode}")
    return last


def compare(undisturbed: Path, interrupted: Path) -> Comparison:
    """The metrics of two runs."""
    whole, other = _trained(undisturbed), _trained(interrupted)
    expected = {line["step"]: line for line in whole}
    seen: dict[int, list[dict[str, object]]] = {}
    for line in other:
        seen.setdefault(int(line["step"]), []).append(line)  # type: ignore[call-overload]
    fields = ("loss", "grad_norm", "learning_rate", "samples", "tokens")
    different = [
        step
        for step, line in expected.items()
        if any(line[field] != found[field] for found in seen.get(step, []) for field in fields)
    ]
    repeated = [step for step in expected if len(seen.get(step, [])) != 1]
    return Comparison(
        len(expected), tuple(different), tuple(repeated + sorted(seen.keys() - expected.keys()))
    )


def _trained(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def _steps(process: subprocess.Popen[str]) -> Iterator[int]:
    """Steps as they are said."""
    assert process.stdout is not None
    for line in process.stdout:
        word, _, rest = line.partition(" ")
        if word == "step" and "tok/s" in rest:
            yield int(rest.split("/")[0])


def quickstart_data(folder: Path) -> Path:
    """The quickstart's kind of data, a little of it; the store's prefix."""
    store = folder / "store"
    if not store.with_name("store.json").is_file():
        for command in (
            ("factory", "generate", "--tasks", "60", "--seed", "0", "--out", str(folder / "domain")),
            ("data", "import", str(folder / "domain/trajectories.jsonl"), "--out", str(folder / "all.jsonl")),
            ("data", "tokenize", str(folder / "all.jsonl"), "--tokenizer", str(folder / "domain/tokenizer"),
             "--out", str(store)),
        ):  # fmt: skip
            subprocess.run([*_KLONG, *command], check=True, stdout=subprocess.DEVNULL)
    return store


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    config = [
        "examples/quickstart/sft.yaml", f"data.sources.replication.store={quickstart_data(given.out)}",
        f"data.phases.train.steps={given.steps}", "training.save_every=3", "training.eval_every=0",
        *given.overrides,
    ]  # fmt: skip
    finish(config, given.out / "undisturbed")
    chance = random.Random(given.seed)
    for number in range(given.count):
        way = WAYS[number % len(WAYS)]
        delay = chance.uniform(0, 2)
        last = interrupt(config, given.out / "interrupted", way, chance.randint(1, 4), delay, chance)
        print(f"{number + 1:>3}  {way}, {delay:.2f} s after step {last}", flush=True)
    finish(config, given.out / "interrupted")
    found = compare(given.out / "undisturbed", given.out / "interrupted")
    print(
        f"{given.count} interruptions of {found.steps} steps: {len(found.different)} steps differ "
        f"{list(found.different)}, {len(found.repeated)} were recorded twice or never {list(found.repeated)}"
    )
    return int(bool(found.different or found.repeated))


if __name__ == "__main__":
    sys.exit(main())
