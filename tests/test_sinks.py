"""TensorBoard and W&B: what is written can be read back; W&B out of reach costs seconds, not the run."""

from __future__ import annotations

import json
import math
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from wandb.proto import wandb_internal_pb2

from megatron_klong.config import ParallelConfig, WandbConfig
from megatron_klong.training.sinks import tensorboard_sink, wandb_sink
from tests.ranks import RankPool
from tests.test_checkpoints import config, run_on_rank


def events(folder: Path) -> list[Event]:
    """All events of a folder, as TensorBoard reads them: files by name, records with their lengths."""
    found = []
    for file in sorted(folder.iterdir()):
        data, place = file.read_bytes(), 0
        while place < len(data):
            (length,) = struct.unpack_from("<Q", data, place)
            found.append(Event.FromString(data[place + 12 : place + 12 + length]))
            place += 16 + length
    return found


def scalars(folder: Path) -> list[tuple[int, dict[str, float]]]:
    return [
        (event.step, {value.tag: value.simple_value for value in event.summary.value})
        for event in events(folder)
        if event.summary.value
    ]


def history(folder: Path) -> list[list[dict[str, Any]]]:
    """The rows of each start, in W&B's offline format: records over blocks, like LevelDB's log."""
    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        data, place, part, rows = file.read_bytes(), 7, b"", []
        while place + 7 <= len(data):
            left = 32768 - place % 32768
            if left < 7:
                place += left
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            if kind == 0:
                break
            piece = data[place + 7 : place + 7 + length]
            place += 7 + length
            part = piece if kind in (1, 2) else part + piece
            if kind in (1, 4):
                record = wandb_internal_pb2.Record.FromString(part)
                if record.WhichOneof("record_type") == "history":
                    items = record.history.item
                    rows.append({(".".join(i.nested_key) or i.key): json.loads(i.value_json) for i in items})
        found.append(rows)
    return found


def test_tensorboard_gets_every_number_at_once(tmp_path: Path) -> None:
    with tensorboard_sink(tmp_path, 1) as sink:
        sink.log(1, {"train/loss": 2.5, "train/grad_norm": 0.5})
        assert scalars(tmp_path) == [(1, {"train/loss": 2.5, "train/grad_norm": 0.5})]  # not only at the end
        sink.log(2, {"train/loss": 2.0})
    assert scalars(tmp_path)[1] == (2, {"train/loss": 2.0})


def test_a_resumed_run_hides_in_tensorboard_what_it_writes_again(tmp_path: Path) -> None:
    for first in (1, 3):
        with tensorboard_sink(tmp_path, first) as sink:
            sink.log(first, {"loss": 1.0})
    starts = [event.step for event in events(tmp_path) if event.session_log.status == SessionLog.START]
    assert sorted(starts) == [1, 3]
    assert len(list(tmp_path.iterdir())) == 2


def rows_of(folder: Path, keys: set[str]) -> list[list[dict[str, Any]]]:
    return [[{key: row[key] for key in keys & row.keys()} for row in rows] for rows in history(folder)]


def test_wandb_logs_offline_and_a_resumed_run_goes_on_under_its_id(tmp_path: Path) -> None:
    said: list[str] = []
    for first in (1, 3):
        with wandb_sink(WandbConfig(mode="offline"), tmp_path, "abc", {"lr": 1.0}, said.append) as sink:
            sink.log(first, {"train/loss": 2.0 / first, "train/grad_norm": math.nan})
            sink.log(first + 1, {"train/loss": 1.0})
    assert said == []
    assert rows_of(tmp_path, {"step", "train/loss", "train/grad_norm"}) == [
        [{"step": 1, "train/loss": 2.0}, {"step": 2, "train/loss": 1.0}],
        [{"step": 3, "train/loss": 2.0 / 3}, {"step": 4, "train/loss": 1.0}],
    ]
    assert {file.name for file in tmp_path.glob("wandb/offline-run-*/*.wandb")} == {"run-abc.wandb"}


@pytest.fixture
def black_hole() -> Iterator[str]:
    """A server that lets everyone in and says nothing."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def wandb_processes() -> list[int]:
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "wandb" in child.name()]


@pytest.mark.parametrize("how", ["refused", "silent", "no key"])
def test_wandb_out_of_reach_is_said_and_logged_offline(
    how: str, black_hole: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", black_hole if how == "silent" else "http://127.0.0.1:1")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # no key of whoever runs the tests
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    if how != "no key":
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    said: list[str] = []
    settings = WandbConfig(mode="online", timeout_seconds=3.0)
    before = time.monotonic()
    with wandb_sink(settings, tmp_path / "log", "abc", {}, said.append) as sink:
        sink.log(1, {"loss": 2.0})
    # A bound against the minute and a half that W&B would wait: no measurement.
    assert time.monotonic() - before < 60
    assert len(said) == 1
    assert said[0].startswith("W&B cannot be reached (")
    assert f"`wandb sync {tmp_path}/log/wandb/offline-run-*` uploads it" in said[0]
    assert rows_of(tmp_path / "log", {"step", "loss"}) == [[{"step": 1, "loss": 2.0}]]
    deadline = time.monotonic() + 30
    while wandb_processes():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_run_logs_the_same_numbers_everywhere(ranks: RankPool, domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(
        domain_store, run, ParallelConfig(), "log.tensorboard=true", "log.wandb={mode: offline}",
        "data.validation_fraction=0.2", "training.eval_every=3",
    )  # fmt: skip
    assert ranks.run(run_on_rank, ParallelConfig(), 1, config=settings) == [None]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    (rows,) = history(run / "wandb")
    named: Callable[[dict[str, Any]], str] = lambda line: (  # noqa: E731
        "train/loss" if line["kind"] == "train" else f"held_out/{line['source']}/loss"
    )
    assert [(row["step"], row[named(line)]) for line, row in zip(lines, rows, strict=True)] == [
        (line["step"], line["loss"]) for line in lines
    ]
    shown = scalars(run / "tensorboard")
    for line, (step, values) in zip(lines, shown, strict=True):
        assert step == line["step"] and values[named(line)] == pytest.approx(line["loss"], rel=1e-6)
    assert os.environ.get("WANDB_SERVICE") is None
