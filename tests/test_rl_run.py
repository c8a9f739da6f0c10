"""Whole runs of `klong rl`: real vLLM, real Megatron on two ranks, real sandboxes; and deaths at any moment.

The model is a tiny random one, which writes nothing sensible. Its work is graded by the length of what it
left, so grades differ and there is something to learn from.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from megatron_klong.checks.tiny import write_tiny_model
from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
from megatron_klong.factory.generate import generate_domain
from megatron_klong.rl.batches import read_batch
from megatron_klong.rl.exchange import Done, Exchange
from megatron_klong.rl.report import RlSummary
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.trajectory.importing import read_file
from megatron_klong.trajectory.interchange import READERS
from megatron_klong.trajectory.schema import Trajectory

pytestmark = pytest.mark.timeout(900)
ITERATIONS, GROUPS, MEMBERS = 3, 2, 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def make_inputs(folder: Path) -> Path:
    """Model, tokenizer, tasks; each task has a check that gives a part of the grade by chance."""
    for name, seed in (("domain", 1), ("held-out", 2)):
        generate_domain(folder / name, count=3, seed=seed, renderer="glm-4.5", experiments=(2, 3),
                        inserted_texts=(MARKER_TEXT, NOTE_TEXT))  # fmt: skip
    for checks in folder.glob("*/tasks/*/checks.json"):
        leaves = json.loads(checks.read_text())
        random = {"command": "echo score: 0.$((RANDOM % 10))"}
        checks.write_text(json.dumps(dict.fromkeys(leaves, random)))
    write_tiny_model(folder / "model", "fp32", vocab_size=288)
    return folder


def write_config(folder: Path, inputs: Path, servers: int = 1) -> Path:
    config = {
        "run": {"dir": str(folder / "run"), "seed": 1},
        "model": {"hf_config": str(inputs / "model"), "weights": str(inputs / "model"), "precision": "fp32"},
        "tokenizer": str(inputs / "domain" / "tokenizer"),
        "window": {"max_tokens": 160, "overlap_tokens": 24, "reserve_generation": 12,
                   "reserve_observation": 40, "max_prefix_fraction": 0.4},
        "parallel": {"expert": 2},
        "optimizer": {"lr": 1e-3, "schedule": "constant"},
        "server": {"model": str(inputs / "model"), "dtype": "float32", "max_model_len": 160},
        "servers": servers,
        "sandbox": {"memory_mib": 128, "processes": 16, "disk_mib": 1},
        "tasks": {"train": str(inputs / "domain" / "tasks"), "held_out": str(inputs / "held-out" / "tasks")},
        "rollout": {"groups": GROUPS, "group_size": MEMBERS, "clock": "token", "tokens_per_call": 1},
        "objective": {"updates": 2, "kl": 0.01},
        "stages": [{"limit": 60, "iterations": 2}, {"limit": 120, "iterations": 1}],
        "max_restarts": 9,
    }  # fmt: skip
    file = folder / "rl.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


class Run:
    """A started `klong rl`, and a look at what it wrote."""

    def __init__(self, folder: Path, inputs: Path, servers: int = 1) -> None:
        self.config = write_config(folder, inputs, servers)
        self.folder = folder / "run"
        self.log = folder / "log"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "megatron_klong.cli", "rl", str(self.config)], stdout=log, stderr=log
            )

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(600)

    def until(self, what: Callable[[], object], seconds: float = 400) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert self.process is not None
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.05)

    def kill(self, pattern: str) -> None:
        """`kill -9` every process of this run whose command line matches."""
        found = [
            pid for pid, line in commands().items() if str(self.folder) in line and re.search(pattern, line)
        ]
        assert found, f"nothing matches {pattern}"
        for pid in found:
            os.kill(pid, signal.SIGKILL)

    def kill_server(self) -> None:
        """`kill -9` vLLM, not the role that watches it."""
        (role,) = (pid for pid, line in commands().items() if f"rl server {self.folder}" in line)
        started = psutil.Process(role).children()
        assert started
        for process in started:
            process.kill()

    def stop(self) -> None:
        """End it, if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)

    def said(self) -> str:
        logs = [self.log, *self.folder.glob("logs/**/*.log")]
        return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)

    def rows(self, columns: str, where: str = "1") -> list[tuple[object, ...]]:
        with sqlite3.connect(f"file:{self.folder}/rollouts/journal.sqlite?mode=ro", uri=True) as db:
            return db.execute(f"SELECT {columns} FROM rollouts WHERE {where} ORDER BY id").fetchall()

    def played(self, purpose: str, iteration: int) -> int:
        if not (self.folder / "rollouts" / "journal.sqlite").is_file():
            return 0
        try:
            return len(self.rows("id", f"purpose = '{purpose}' AND iteration = {iteration}"))
        except sqlite3.OperationalError:
            return 0  # its tables are not there yet

    def done(self, iteration: int) -> Done | None:
        return Exchange(self.folder / "exchange").heard(f"done-{iteration}", Done)


def klong(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_klong.cli", "rl", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def commands() -> dict[int, str]:
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
    return found


def check_complete(run: Run) -> None:
    """Every rollout is there once, every batch was trained on once, in order, under the weights before it."""
    expected = [(f"train-{i:05d}-{g:03d}-{m:02d}",) for i in range(1, ITERATIONS + 1)
                for g in range(GROUPS) for m in range(MEMBERS)]  # fmt: skip
    assert run.rows("id", "purpose = 'train'") == expected
    assert {row[0] for row in run.rows("state")} == {"graded"}
    consumed: list[str] = []
    for iteration in range(1, ITERATIONS + 1):
        batch = read_batch(run.folder / "batches", iteration)
        assert list(batch.header.rollouts) == [row[0] for row in expected if f"-{iteration:05d}-" in row[0]]
        scores = [row[0] for row in run.rows("score", f"purpose = 'train' AND iteration = {iteration}")]
        assert list(batch.header.scores) == scores
        lineage, _, number = batch.header.version.partition(":")
        assert number == str(iteration - 1)
        versions = {row[0] for row in run.rows("version", f"purpose = 'train' AND iteration = {iteration}")}
        assert versions == {batch.header.version}
        consumed += batch.header.groups
        done = run.done(iteration)
        assert done is not None and done.served.iteration == iteration
        assert done.served.version == f"{lineage}:{iteration}"
        assert done.served.difference < 1e-4
    assert len(consumed) == len(set(consumed)) == ITERATIONS * GROUPS
    saved = sorted((run.folder / "checkpoints").glob("step_*"))
    assert saved[-1].name == f"step_{2 * ITERATIONS:08d}"  # two updates on each batch, no more
    common = torch.load(saved[-1] / "common.pt", weights_only=False)
    assert common["progress"]["iteration"] == ITERATIONS
    assert list(common["progress"]["consumed"]) == consumed
    summary = RlSummary.model_validate_json((run.folder / "summary.json").read_text())
    assert [evaluation.iteration for evaluation in summary.evaluations] == [0, 2, 3]
    assert summary.contexts_checked == summary.rollouts == ITERATIONS * GROUPS * MEMBERS + 3 * 3


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run = Run(tmp_path_factory.mktemp("undisturbed"), inputs, servers=2)
    run.start()
    try:
        assert run.wait() == 0, run.said()
    finally:
        run.stop()
    return run


def test_a_whole_run(undisturbed: Run) -> None:
    run = undisturbed
    check_complete(run)
    updates = [run.done(i).updates for i in range(1, ITERATIONS + 1)]  # type: ignore[union-attr]
    assert all(len(each) == 2 for each in updates)
    assert all(update.grad_norm > 0 for each in updates for update in each)
    # The engine's log-probs are the trainer's: nothing was lost or mixed up on the way.
    assert all(each[0].engine_difference < 1e-4 for each in updates)
    assert all(each[0].ratio == pytest.approx(1, abs=1e-6) for each in updates)
    stages = [read_batch(run.folder / "batches", i).header.stage for i in range(1, ITERATIONS + 1)]
    assert stages == [0, 0, 1]
    tokens = [
        np.mean([row[0] for row in run.rows("generated_tokens", f"purpose='train' AND iteration={i}")])  # type: ignore[arg-type]
        for i in (1, 3)
    ]
    assert 55 <= tokens[0] + 5 < tokens[1]  # the second stage has twice the time
    windows = [len(read_batch(run.folder / "batches", i).segments) for i in (1, 3)]
    assert windows[1] > GROUPS * MEMBERS  # episodes of several windows
    said = run.log.read_text()
    assert "iteration   3/3  held-out grade" in said and "done: held-out grade" in said
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == [
        "evaluation", "rollouts", "update", "rollouts", "update", "evaluation", "rollouts", "update",
        "evaluation",
    ]  # fmt: skip
    left = [line for line in commands().values() if str(run.folder) in line]
    assert not left


def test_a_finished_run_is_left_as_it_is(undisturbed: Run, inputs: Path) -> None:
    before = (undisturbed.folder / "summary.json").stat().st_mtime_ns
    undisturbed.start()
    assert undisturbed.wait() == 0
    assert "this run has finished" in undisturbed.log.read_text()
    assert (undisturbed.folder / "summary.json").stat().st_mtime_ns == before
    assert klong("orchestrator", str(undisturbed.config)).returncode == 0
    assert "the config has servers=2" in klong("server", str(undisturbed.config), "--number", "2").stderr
    # Other tasks under the same path are another run.
    extra = inputs / "domain" / "tasks" / "extra"
    shutil.copytree(next((inputs / "domain" / "tasks").iterdir()), extra)
    try:
        (extra / "task.json").write_text((extra / "task.json").read_text().replace('"id": "', '"id": "x'))
        again = klong(str(undisturbed.config))
        assert again.returncode == 2 and "tasks.train.content" in again.stderr
    finally:
        shutil.rmtree(extra)


def test_rollouts_are_exported_with_what_was_sampled(undisturbed: Run, tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    command = [sys.executable, "-m", "megatron_klong.cli", "data", "export", str(undisturbed.folder)]
    subprocess.run([*command, "--to", "atif", "--out", str(out)], check=True, timeout=120)
    read = list(read_file(out, READERS["atif"]))
    assert len(read) == len(undisturbed.rows("id"))
    found = {item.id: item for item in read if isinstance(item, Trajectory)}
    refused = [item for item in read if not isinstance(item, Trajectory)]
    assert all("without content, reasoning or calls" in item.reason for item in refused)
    assert len(found) > len(read) / 2
    for name, score, tokens in undisturbed.rows("id, score, generated_tokens"):
        item = found.get(str(name))
        if item is None:
            continue
        metrics = [m.metadata["step"]["metrics"] for m in item.messages if m.role == "assistant"]
        ids = [token for each in metrics for token in each["completion_token_ids"]]
        assert (item.reward, len(ids)) == (score, tokens)
        assert all(len(each["completion_token_ids"]) == len(each["logprobs"]) for each in metrics)
        assert all(log_prob <= 0 for each in metrics for log_prob in each["logprobs"])
    batch = read_batch(undisturbed.folder / "batches", 1)
    segment = next(s for s in batch.segments if s.sample.window == 0
                   and batch.header.rollouts[s.sample.trajectory] in found)  # fmt: skip
    first = found[batch.header.rollouts[segment.sample.trajectory]]
    sampled = segment.sample.tokens_T[segment.sample.loss_mask_T].tolist()
    exported = [token for m in first.messages if m.role == "assistant"
                for token in m.metadata["step"]["metrics"]["completion_token_ids"]]  # fmt: skip
    assert exported[: len(sampled)] == sampled


def test_a_live_run_is_not_touched(undisturbed: Run) -> None:
    files = sorted(undisturbed.folder.rglob("*"))
    with RunDirectory(undisturbed.folder).locked():
        again = klong(str(undisturbed.config), "--fresh")
    assert again.returncode == 2 and "another process is running in it" in again.stderr
    assert sorted(undisturbed.folder.rglob("*")) == files


@pytest.fixture
def run(inputs: Path, tmp_path: Path) -> Iterator[Run]:
    started = Run(tmp_path, inputs)
    yield started
    started.stop()


def test_deaths_of_every_process(run: Run) -> None:
    """`kill -9` of the server in rollouts, of the orchestrator in rollouts, of a trainer's rank in training,
    and at last of the supervisor; each comes back, and nothing is lost or done twice."""
    run.start()
    run.until(lambda: run.played("train", 1) >= 2)
    kept = run.rows("id, score, generated_tokens, conversation", "state = 'graded'")
    run.kill_server()
    run.until(lambda: run.played("train", 1) >= 5)
    run.kill("rl orchestrator")
    run.until(lambda: (run.folder / "batches" / "00001").is_dir())
    run.kill(r"rl\.worker")
    run.until(lambda: run.played("train", 2) >= 3)
    run.kill("rl trainer")
    run.until(lambda: (run.folder / "batches" / "00002").is_dir())
    assert run.process is not None
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    deadline = time.monotonic() + 30
    while any(str(run.folder) in line for line in commands().values()):
        assert time.monotonic() < deadline, "the supervisor's children outlive it"
        time.sleep(0.1)
    run.start()
    assert run.wait() == 0, run.said()
    check_complete(run)
    after = {row[0]: row for row in run.rows("id, score, generated_tokens, conversation")}
    assert all(after[row[0]] == row for row in kept)  # what was graded was not played again
    said = run.log.read_text()
    for name in ("orchestrator", "trainer", "server 0"):
        assert f"the {name} " in said and "started again" in said


def test_wrong_settings_are_told_before_anything_starts(inputs: Path, tmp_path: Path) -> None:
    config = str(write_config(tmp_path, inputs))

    def refused(*arguments: str) -> str:
        ended = klong(*arguments)
        assert ended.returncode == 2, ended.stderr
        lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1
        return lines[0]

    assert "server.max_model_len=100 is less than window.max_tokens=160" in refused(
        config, "server.max_model_len=100"
    )
    assert "no folder in it has a task.json" in refused(config, f"tasks.train={tmp_path}")
    assert "tokenizer: no tokenizer.json in" in refused(config, f"tokenizer={tmp_path}")
    assert "stages" in refused(config, "stages=[]")
    assert "unknown key 'rollout.grops'; did you mean 'rollout.groups'?" in refused(config, "rollout.grops=3")
    assert "does not match model.precision=fp32" in refused(config, "server.dtype=bfloat16")
    assert "model.weights is missing" in refused(config, "model.weights=null")
    assert "normalise=rollout does not go with objective.updates=2" in refused(
        config, "objective.normalise=rollout"
    )
    assert "held-out tasks are never trained on" in refused(
        config, f"tasks.held_out={inputs / 'domain' / 'tasks'}"
    )
    assert "over the prefix cap" in refused(config, "window.max_prefix_fraction=0.1")
    assert "which sandboxes show to agents" in refused(config, "run.dir=/usr/local/run")
    assert "name the CONFIG" in refused("trainer")
    assert "--fresh is for" in refused("trainer", config, "--fresh")
    assert "Not a file" in refused(config + "x") or "No such file" in refused(config + "x")
    assert not (tmp_path / "run").exists()
