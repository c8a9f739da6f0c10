"""Who is found guilty of a hang."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_klong.training.watchdog import Beat, Watchdog, culprits, watched

RANK = """
import sys, time
from pathlib import Path
from megatron_klong.training.watchdog import watched

folder, rank, ranks, hangs = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
if hangs == "waits":
    import torch
with watched(folder, rank, ranks, 1.0) as watch:
    for step in range(1, 1000):
        watch.move("training", step)
        if hangs == "yes" and step == 5:
            time.sleep(600)
        if hangs == "waits" and step == 5:
            store = torch.distributed.TCPStore("127.0.0.1", 0, 1, True, wait_for_workers=False)
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=2)
        time.sleep(0.05)
"""


def beat(step: int, *, waits: bool, number: int = 1) -> Beat:
    return Beat(number=number, step=step, phase="training", moves=step, waits=waits, where="f (x.py:1)")


def test_the_guilty_rank_is_the_one_that_does_not_wait() -> None:
    assert culprits({0: beat(5, waits=True), 1: beat(5, waits=False), 2: beat(5, waits=True)}) == [1]


def test_where_none_or_all_wait_the_one_behind_is_guilty() -> None:
    for waits in (True, False):
        assert culprits({0: beat(5, waits=waits), 1: beat(4, waits=waits), 2: beat(5, waits=waits)}) == [1]
        assert culprits({0: beat(5, waits=waits), 1: beat(5, waits=waits)}) == []


def test_a_rank_alone_is_guilty_itself() -> None:
    assert culprits({0: beat(5, waits=True)}) == [0]


def start(folder: Path, rank: int, ranks: int, hangs: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RANK, str(folder), str(rank), str(ranks), hangs],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_rank_that_hangs_names_itself_and_where(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 1, "yes")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 2
    assert stderr.splitlines()[-1] == (
        "error: no progress for training.hang_seconds=1: rank 0 (step 5, training, in <module> "
        "(<string>:13)) hangs, and the others wait for it; its stack is in its log"
    )
    assert 'File "<string>", line 13 in <module>' in stderr  # the stack


def test_a_rank_that_is_stopped_is_named_by_one_that_waits(tmp_path: Path) -> None:
    stopped, waiting = start(tmp_path, 0, 2, "no"), start(tmp_path, 1, 2, "yes")
    try:
        while not ((tmp_path / "rank_0.json").exists() and (tmp_path / "rank_1.json").exists()):
            assert stopped.poll() is None and waiting.poll() is None
            time.sleep(0.05)
        os.kill(stopped.pid, signal.SIGSTOP)
        _, stderr = waiting.communicate(timeout=60)
    finally:
        stopped.kill()
        stopped.wait()
    assert waiting.returncode == 2
    assert "no sign of life from rank 0 (step " in stderr.splitlines()[-1]
    assert (tmp_path / "verdict.txt").read_text() in stderr.splitlines()[-1]


def test_a_rank_that_never_wrote_is_named(tmp_path: Path) -> None:
    process = start(tmp_path, 0, 2, "yes")
    _, stderr = process.communicate(timeout=60)
    assert "no sign of life from rank 1 (it has never been heard)" in stderr.splitlines()[-1]


def test_ranks_that_are_all_busy_do_not_wait_for_one_another(tmp_path: Path) -> None:
    watchdog = Watchdog(tmp_path, 0, 2, 1.0)
    for waits, said in ((False, "are busy with the same"), (True, "wait for one another")):
        first = {rank: beat(5, waits=waits) for rank in (0, 1)}
        second = {rank: beat(5, waits=waits, number=2) for rank in (0, 1)}
        assert f"all ranks {said} (step 5, training, in f (x.py:1))" in watchdog._explain(first, second)


def test_a_verdict_that_cannot_be_shared_is_said_all_the_same(tmp_path: Path) -> None:
    """The file system may be what ranks hang on."""
    assert Watchdog(tmp_path / "nowhere", 0, 1, 1.0)._agreed("rank 0 did it") == "rank 0 did it"


def test_what_the_first_has_found_the_others_repeat(tmp_path: Path) -> None:
    process = start(tmp_path, 1, 2, "yes")
    while not (tmp_path / "rank_1.json").exists():
        time.sleep(0.05)
    (tmp_path / "verdict.txt").write_text("rank 7 did it")
    _, stderr = process.communicate(timeout=60)
    assert stderr.splitlines()[-1] == "error: rank 7 did it"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_verdict_of_a_run_before_is_removed_by_the_first_rank(tmp_path: Path, rank: int) -> None:
    (tmp_path / "verdict.txt").write_text("old")
    process = start(tmp_path, rank, 2, "no")
    while not (tmp_path / f"rank_{rank}.json").exists():
        assert process.poll() is None
        time.sleep(0.05)
    assert (tmp_path / "verdict.txt").exists() == (rank == 1)
    process.kill()
    process.communicate()


def test_a_wait_for_other_ranks_is_seen_as_one(tmp_path: Path) -> None:
    waiting = start(tmp_path, 0, 2, "waits")
    while not (tmp_path / "rank_0.json").exists():  # importing torch takes seconds
        assert waiting.poll() is None
        time.sleep(0.05)
    hanging = start(tmp_path, 1, 2, "yes")
    _, said = hanging.communicate(timeout=60)
    waiting.communicate(timeout=60)
    assert "rank 1 (step 5, training, in <module> (<string>:13)) hangs" in said.splitlines()[-1]


def test_a_rank_is_heard_before_its_first_step(tmp_path: Path) -> None:
    """Beats are far apart: one that stops within its first steps must not look as if it had never begun."""
    with watched(tmp_path, 0, 1, 1e6):
        assert json.loads((tmp_path / "rank_0.json").read_text())["step"] == 0
