"""The recipe of general data first and split trajectories then, as its example runs it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(600)
def test_the_recipe_trains_phase_after_phase_and_reports_by_source(tmp_path: Path) -> None:
    """In a copy of the example, with a short second phase; the first is as long as its data."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    done = subprocess.run(
        ["examples/two_phase_sft/run.sh", "data.phases.trajectories.steps=3", "training.eval_every=100"],
        cwd=tmp_path, capture_output=True, text=True, timeout=560,
        env={**os.environ, "BIN": str(Path(sys.executable).parent), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    planned = {name: (int(first), int(last)) for name, first, last in
               re.findall(r"phase +(\w+): steps (\d+) to (\d+)", done.stdout)}  # fmt: skip
    run = tmp_path / "runs" / "two-phase" / "sft"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in lines if line["kind"] == "train"]
    for name, (first, last) in planned.items():
        assert [line["step"] for line in trained if line["phase"] == name] == list(range(first, last + 1))
    assert list(planned) == ["general", "trajectories"] and len(trained) == planned["trajectories"][1]
    sources = ["chat", "code", "math", "search", "replication"]
    held_out = [line for line in lines if line["kind"] == "validation"]
    assert [line["source"] for line in held_out] == sources * 2  # before the first step, and after the last
    for before, after in zip(held_out[:5], held_out[5:]):
        assert after["loss"] < before["loss"]
    assert len(list((run / "tensorboard").iterdir())) == 1
    assert "held-out loss of replication" in done.stdout
