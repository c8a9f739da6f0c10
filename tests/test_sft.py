"""`klong sft` as a user runs it: real ranks over gloo, started, resumed, interrupted, refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.interruptions import WAYS, Comparison, Way, compare, finish, interrupt

ROOT = Path(__file__).parents[1]
KLONG = [sys.executable, "-W", "ignore", "-m", "megatron_klong.cli"]
MARK = "KLONG_TEST_MARK"
STORE = "data.sources.replication.store"


def arguments(store: Path, run: Path, *overrides: str) -> list[str]:
    """A run of a few steps of the quickstart's config on the test's data."""
    return [
        *KLONG, "sft", "examples/quickstart/sft.yaml", f"{STORE}={store}", f"run.dir={run}",
        "data.validation_fraction=0.2", "data.row_tokens=256", "data.phases.train.steps=4",
        "training.save_every=2",
        "training.eval_every=2", "training.eval_rows=2", "training.global_batch_rows=2",
        "log.every=1", "optimizer.warmup_steps=1", *overrides,
    ]  # fmt: skip


def sft(store: Path, run: Path, *overrides: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        arguments(store, run, *overrides), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[tuple[str, int, float]]:
    return [(line["kind"], line["step"], line["loss"]) for line in metrics(run)]


@pytest.fixture(scope="module")
def finished(domain_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on TP2 x PP2 x EP2."""
    run = tmp_path_factory.mktemp("finished") / "run"
    sft(domain_store, run)
    return run


def test_four_ranks_train_and_report(finished: Path) -> None:
    told = losses(finished)
    assert [(kind, step) for kind, step, _ in told] == [
        ("validation", 0), ("train", 1), ("train", 2), ("validation", 2),
        ("train", 3), ("train", 4), ("validation", 4),
    ]  # fmt: skip
    assert told[-1][2] < told[3][2] < told[0][2]  # held-out loss falls
    assert told[5][2] < told[1][2]  # train loss falls
    assert all(line["trained_tokens"] > 0 for line in metrics(finished))
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == [
        "step_00000002", "step_00000004",
    ]  # fmt: skip


@pytest.mark.parametrize(("way", "after"), [(WAYS[0], 1), (WAYS[1], 3), (WAYS[2], 3)], ids=WAYS)
def test_an_interrupted_run_ends_with_the_losses_of_an_undisturbed_one(
    finished: Path, domain_store: Path, tmp_path: Path, way: Way, after: int
) -> None:
    """The same layout: bitwise, and no sample twice or left out. SIGTERM saves, so that nothing is lost.

    Of the kills one is with what is saved in the background, which may not be complete one step later, the
    other with deterministic kernels.
    """
    run = tmp_path / "run"
    more = [f"training.save_in_background={way != WAYS[2]}", f"model.deterministic={way == WAYS[2]}"]
    settings = arguments(domain_store, run, *more)[len(KLONG) + 1 :]
    last = interrupt(settings, run, way, after, 0.0, random.Random(0))
    assert last == after
    saved = sorted(int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*"))
    resumed = max(saved, default=0)
    assert resumed >= last if way == WAYS[0] else resumed <= last
    assert resumed or way == WAYS[1]
    second = finish(settings, run)
    assert not resumed or f"resumed from step_{resumed:08d}: {4 - resumed} steps to go" in second
    assert compare(finished, run) == Comparison(steps=4, different=(), repeated=())
    assert losses(run) == losses(finished)  # and the held-out losses


def test_a_finished_run_started_again_does_nothing(finished: Path, domain_store: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = sft(domain_store, finished)
    told = losses(finished)
    moved = f"held-out loss of replication {told[0][2]:.4f} -> {told[-1][2]:.4f}"
    assert f"done: {moved}, train loss" in again.stdout
    assert "resumed from step_00000004: 0 steps to go" in again.stdout
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_json_is_of_a_dry_run(domain_store: Path, tmp_path: Path) -> None:
    assert "--json is for --dry-run" in sft(domain_store, tmp_path / "run", "--json", code=2).stderr
    assert not (tmp_path / "run").exists()


def test_another_run_in_the_same_directory_is_refused(finished: Path, domain_store: Path) -> None:
    refused = sft(domain_store, finished, "optimizer.lr=1e-2", code=2)
    assert refused.stderr.count("\n") == 1
    assert (
        "holds a run with other settings: optimizer.lr (optimizer.lr was 0.003, now 0.01)" in refused.stderr
    )


def test_a_changed_model_under_a_run_is_refused(finished: Path, domain_store: Path, tmp_path: Path) -> None:
    config = json.loads((ROOT / "examples" / "quickstart" / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "routed_scaling_factor": 2.0}))
    refused = sft(domain_store, finished, f"model.hf_config={tmp_path}", code=2)
    assert "other settings: model.moe.scaling" in refused.stderr


def test_changed_data_under_a_run_is_refused(finished: Path, domain_store: Path) -> None:
    header = domain_store.with_name("replication.json")
    before = header.read_text()
    try:
        header.write_text(json.dumps({**json.loads(before), "content_sha256": "other"}))
        assert (
            "other settings: data.sources.replication.content" in sft(domain_store, finished, code=2).stderr
        )
    finally:
        header.write_text(before)
    tokens = domain_store.with_name("replication.bin")
    with tokens.open("r+b") as stream:
        first = stream.read(1)
        try:  # in place, under the old header
            stream.seek(0)
            stream.write(bytes([first[0] ^ 1]))
            stream.flush()
            said = sft(domain_store, finished, code=2).stderr
        finally:
            stream.seek(0)
            stream.write(first)
    assert "other settings: data.sources.replication.content" in said


def test_a_diverged_run_stops_and_says_so(domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = sft(domain_store, run, "optimizer.lr=1e30", "optimizer.clip_grad=0", code=2)
    assert "are not both finite; the batch is described in" in stopped.stderr
    assert not (run / "checkpoints" / "step_00000004").exists()
    assert all(abs(line["loss"]) < float("inf") for line in metrics(run))


def test_a_directory_with_other_files_is_refused(domain_store: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    refused = sft(domain_store, tmp_path, "--fresh", code=2)
    assert "holds files that are no run of this package" in refused.stderr
    assert (tmp_path / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?"),
        ("model.hf_config=/nowhere", "/nowhere: no config.json here"),
        ("data.sources.replication.store=/nowhere/x", "store /nowhere/x: no readable header x.json"),
        ("data.window.max_tokens=64", "window: max_tokens=64 is too small"),
        (
            "parallel.virtual=3",
            "parallel.virtual=3 exceeds the model's num_hidden_layers=4",
        ),
        ("parallel.tensor=4", "parallel.tensor=4 does not divide the model's num_key_value_heads=2"),
        (
            "data.validation_fraction=0.01",
            "data.validation_fraction=0.01 of the 12 trajectories of replication",
        ),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    domain_store: Path, tmp_path: Path, override: str, message: str
) -> None:
    refused = sft(domain_store, tmp_path / "run", override, code=2)
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    """Also after a test that has failed."""
    yield
    for pid in marked(""):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def marked(mark: str) -> set[int]:
    """Processes with the mark in their environment, or any for none: renaming does not hide them."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                values = (folder / "environ").read_bytes().split(b"\0")
                given = [value for value in values if value.startswith(f"{MARK}=".encode())]
                if given and (not mark or given[0] == f"{MARK}={mark}".encode()):
                    found.add(int(folder.name))
            except OSError:
                continue  # it ended, or is not ours
    return found


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def endless(store: Path, run: Path, mark: str, *overrides: str) -> subprocess.Popen[str]:
    """A run of many steps that has taken its first; all its processes carry the mark."""
    process = subprocess.Popen(
        arguments(store, run, "data.phases.train.steps=1000", *overrides),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, MARK: mark},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1/1000"):
            return process
    raise AssertionError(process.communicate())


def rank_process(mark: str, rank: int) -> int:
    """The process of a rank."""
    return next(
        pid
        for pid in marked(mark)
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_run_that_is_ended_saves_and_leaves_no_process(
    domain_store: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Also when its launcher is killed, by which the kernel tells the ranks to end."""
    run = tmp_path / "run"
    process = endless(domain_store, run, number.name, "training.save_every=0")
    assert len(marked(number.name)) >= 5  # this one and four ranks
    second = sft(domain_store, run, "data.phases.train.steps=1000", code=2)
    assert "another process is running in it" in second.stderr
    process.send_signal(number)
    if number is signal.SIGKILL:
        process.wait(timeout=60)
        # The ranks hold the directory until they have saved.
        if marked(number.name):
            assert "another process" in sft(domain_store, run, "data.phases.train.steps=1000", code=2).stderr
        wait_until(lambda: not marked(number.name))
        assert process.returncode == -9
    else:
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 128 + number
        assert stderr.splitlines() == [
            f"{number.name}: the ranks end their step and save, for at most 600 s; again to end them at once",
            f"stopped by {number.name}",
        ]
        assert "; start again to go on" in stdout
        assert "; start again to go on" in (run / "run.log").read_text()
    wait_until(lambda: not marked(number.name))
    (saved,) = (run / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("step_")) == metrics(run)[-1]["step"]


def test_asked_twice_a_run_ends_at_once(domain_store: Path, tmp_path: Path) -> None:
    """A rank that is stopped cannot save; the second signal does not wait for it."""
    process = endless(domain_store, tmp_path / "run", "twice")
    os.kill(rank_process("twice", 3), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    assert process.stderr is not None
    assert "again to end them at once" in process.stderr.readline()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)  # far below training.stop_seconds
    assert process.returncode == 143
    assert "stopped by SIGTERM without rank " in stderr and "what was not saved is lost" in stderr
    wait_until(lambda: not marked("twice"))


def test_ranks_that_do_not_end_in_time_are_ended(domain_store: Path, tmp_path: Path) -> None:
    process = endless(domain_store, tmp_path / "run", "late", "training.stop_seconds=2")
    os.kill(rank_process("late", 1), signal.SIGSTOP)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and "for at most 2 s" in stderr
    assert "stopped by SIGTERM without rank " in stderr and "what was not saved is lost" in stderr
    wait_until(lambda: not marked("late"))


def test_a_rank_that_hangs_is_named_and_the_run_is_stopped(domain_store: Path, tmp_path: Path) -> None:
    process = endless(domain_store, tmp_path / "run", "hang", "training.hang_seconds=8")
    os.kill(rank_process("hang", 2), signal.SIGSTOP)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 2
    assert stderr.count("\n") == 1
    assert stderr.startswith(
        "error: no progress for training.hang_seconds=8: no sign of life from rank 2 (step "
    )
    assert (
        "Current thread" in (tmp_path / "run" / "logs" / "rank_0.log").read_text()
        or "Thread 0x" in (tmp_path / "run" / "logs" / "rank_1.log").read_text()
    )
    wait_until(lambda: not marked("hang"))


def test_a_killed_rank_ends_the_run_and_is_named(domain_store: Path, tmp_path: Path) -> None:
    process = endless(domain_store, tmp_path / "run", "rank")
    assert metrics(tmp_path / "run")[0]["step"] == 0
    os.kill(rank_process("rank", 2), signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "rank 2 was killed by SIGKILL; its log: " in stderr
    wait_until(lambda: not marked("rank"))


def test_torchrun_starts_the_same_command(finished: Path, domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    command = arguments(domain_store, run)[len(KLONG) :]
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4",
            "-m", "megatron_klong.cli", *command,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(run) == losses(finished)


def test_real_trajectories_train(real_store: tuple[Path, Path], tmp_path: Path) -> None:
    """Single-user runs far longer than the window and multi-user conversations, on TP2 x PP2 x EP2."""
    _, store = real_store
    model = json.loads((ROOT / "examples" / "quickstart" / "model" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**model, "vocab_size": 2048}))
    run = tmp_path / "run"
    sft(
        store, run, f"model.hf_config={tmp_path}", "data.row_tokens=8192", "data.window.prefix=task",
        "data.window.max_tokens=8192", "data.window.overlap_tokens=1024",
        "data.window.reserve_generation=512", "data.window.reserve_observation=1024",
        "data.phases.train.steps=3", "training.save_every=0", "training.eval_every=0",
    )  # fmt: skip
    told = [line for line in metrics(run) if line["kind"] == "train"]
    assert [line["step"] for line in told] == [1, 2, 3]
    assert all(line["tokens"] > 8192 and line["trained_tokens"] > 100 for line in told)
    assert told[-1]["loss"] < told[0]["loss"]
