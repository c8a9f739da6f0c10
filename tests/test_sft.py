"""`klong sft` as a user runs it: real ranks over gloo, started, resumed, interrupted, refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
KLONG = [sys.executable, "-W", "ignore", "-m", "megatron_klong.cli"]
MARK = "KLONG_TEST_MARK"


def arguments(store: Path, run: Path, *overrides: str) -> list[str]:
    """A run of a few steps of the quickstart's config on the test's data."""
    return [
        *KLONG, "sft", "examples/quickstart/sft.yaml", f"data.store={store}", f"run.dir={run}",
        "data.validation_fraction=0.2", "training.steps=4", "training.save_every=2",
        "training.eval_every=2", "training.eval_rows=2", "training.global_batch_rows=2",
        "training.log_every=1", "optimizer.warmup_steps=1", *overrides,
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


@pytest.mark.parametrize("step", [1, 3], ids=["before a checkpoint", "after one"])
def test_an_interrupted_run_ends_with_the_losses_of_an_undisturbed_one(
    finished: Path, domain_store: Path, tmp_path: Path, step: int
) -> None:
    run = tmp_path / "run"
    process = subprocess.Popen(
        arguments(domain_store, run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(f"step     {step}/4"):
            process.send_signal(signal.SIGINT)
            break
    process.stdout.read()
    assert process.wait(timeout=60) == 130
    second = sft(domain_store, run)
    assert ("resumed from step_00000002: 2 steps to go" in second.stdout) == (step == 3)
    assert losses(run) == losses(finished)  # the same layout: bitwise, and no line twice


def test_resume_at_another_layout_goes_on_alike(finished: Path, domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    half = sft(domain_store, run, "training.save_every=2", "training.keep_last=5")
    assert "TP2 CP1 PP2 EP2 DP1" in half.stdout
    for path in (run / "checkpoints" / "step_00000004").iterdir():
        path.unlink()
    (run / "checkpoints" / "step_00000004").rmdir()
    other = sft(
        domain_store, run, "parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2", "parallel.nproc=2"
    )
    assert "TP1 CP1 PP1 EP2 DP2" in other.stdout
    assert "resumed from step_00000002: 2 steps to go" in other.stdout
    for ours, expected in zip(losses(run), losses(finished), strict=True):
        assert ours[:2] == expected[:2]
        assert ours[2] == pytest.approx(expected[2], rel=1e-4)


def test_a_finished_run_started_again_does_nothing(finished: Path, domain_store: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = sft(domain_store, finished)
    told = losses(finished)
    assert f"done: held-out loss {told[0][2]:.4f} -> {told[-1][2]:.4f}, train loss" in again.stdout
    assert "resumed from step_00000004: 0 steps to go" in again.stdout
    assert (finished / "metrics.jsonl").read_bytes() == before


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
        assert "other settings: data.content" in sft(domain_store, finished, code=2).stderr
    finally:
        header.write_text(before)


def test_a_diverged_run_stops_and_says_so(domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stopped = sft(domain_store, run, "optimizer.lr=1e30", "optimizer.clip_grad=0", code=1)
    assert "are not finite; the last checkpoint is from before this step" in stopped.stderr
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
        ("data.store=/nowhere/x", "store /nowhere/x: no readable header x.json"),
        ("data.window.max_tokens=64", "window: max_tokens=64 is too small"),
        ("parallel.tensor=4", "parallel.tensor=4 does not divide the model's num_key_value_heads=2"),
        ("data.validation_fraction=0.01", "data.validation_fraction=0.01 of the 12 trajectories"),
    ],
)
def test_user_errors_are_one_line_and_exit_2(
    domain_store: Path, tmp_path: Path, override: str, message: str
) -> None:
    refused = sft(domain_store, tmp_path / "run", override, code=2)
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ")
    assert message in refused.stderr


def marked(mark: str) -> set[int]:
    """Processes with the mark in their environment: renaming does not hide them."""
    found = set()
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.add(int(folder.name))
            except OSError:
                continue  # it ended, or is not ours
    return found


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_its_owner(domain_store: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = subprocess.Popen(
        arguments(domain_store, tmp_path / "run", "training.steps=1000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, MARK: number.name},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1/1000"):
            break
    assert len(marked(number.name)) >= 5  # this one and four ranks
    second = sft(domain_store, tmp_path / "run", "training.steps=1000", code=2)
    assert "another process is running in it" in second.stderr
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if number is signal.SIGKILL else 128 + number)
    if number is not signal.SIGKILL:
        assert stderr == f"stopped by {number.name}\n"
    wait_until(lambda: not marked(number.name))


def test_a_killed_rank_ends_the_run_and_is_named(domain_store: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        arguments(domain_store, tmp_path / "run", "training.steps=1000"),
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, MARK: "rank"},
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step     1/1000"):
            break
    assert metrics(tmp_path / "run")[0]["step"] == 0
    victim = next(
        pid for pid in marked("rank") if b"RANK=2" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    )
    os.kill(victim, signal.SIGKILL)
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
        "training.steps=3", "training.save_every=0", "training.eval_every=0",
    )  # fmt: skip
    told = [line for line in metrics(run) if line["kind"] == "train"]
    assert [line["step"] for line in told] == [1, 2, 3]
    assert all(line["tokens"] > 8192 and line["trained_tokens"] > 100 for line in told)
    assert told[-1]["loss"] < told[0]["loss"]
