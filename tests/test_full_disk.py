"""A disk that is full: whoever writes says so in one line, also where its log cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_klong.training.appending import append_line, told_in_one_line
from megatron_klong.training.metrics import RunLog, Speed
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.step import EvaluationResult

FULL = Path("/dev/full")

LAUNCHER = """
import sys
from pathlib import Path
from megatron_klong.training.local_ranks import run_ranks
sys.exit(run_ranks("ends_badly", ["x"], 2, Path(sys.argv[1])))
"""

WORKER = """
import os, time
from megatron_klong.training.rank_entry import RankError, run_rank

def work(path):
    if os.environ["RANK"] == "1":
        raise RankError("the reason " + "x" * 5000)
    time.sleep(60)

run_rank(work)
"""


def test_a_line_is_written_whole_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "lines"
    append_line(file, "one")
    append_line(file, "two")
    assert file.read_text() == "one\ntwo\n"
    said = r"/dev/full could not be written: .*No space left.* start again"
    with pytest.raises(RankError, match=said), told_in_one_line(FULL):
        append_line(FULL, "three")


def test_numbers_that_cannot_be_written_end_the_run(tmp_path: Path) -> None:
    """What is said to a person is not worth it."""
    speed = Speed(devices=1, peak_tflops=None)
    with RunLog(FULL, FULL, writes=True, total_steps=1, log_every=1, speed=speed) as log:
        log.say("hello")
        with pytest.raises(RankError, match="/dev/full could not be written"):
            log.evaluation(1, {"chat": EvaluationResult(loss=1.0, trained_tokens=3)})


def test_a_held_out_loss_that_is_no_number_is_json(tmp_path: Path) -> None:
    speed = Speed(devices=1, peak_tflops=None)
    numbers = tmp_path / "metrics.jsonl"
    with RunLog(numbers, tmp_path / "run.log", writes=True, total_steps=1, log_every=1, speed=speed) as log:
        log.evaluation(1, {"chat": EvaluationResult(loss=float("nan"), trained_tokens=3)})
    assert '"loss": null' in numbers.read_text()


def test_the_launcher_hears_the_reason_where_the_log_does_not(tmp_path: Path) -> None:
    """The ranks' logs are on the full disk, too."""
    (tmp_path / "ends_badly.py").write_text(WORKER)
    logs = tmp_path / "logs"
    logs.mkdir()
    for rank in (0, 1):
        (logs / f"rank_{rank}.log").symlink_to(FULL)
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHER, logs], capture_output=True, text=True, timeout=60, check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[1]}"},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: the reason " + "x" * 5000 + "\n"
