"""The directory of a run: one run lives in it, and a second start resumes that one or is refused."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from megatron_klong.config import SftConfig, dump_config
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.training.fingerprint import store_fingerprint, weights_fingerprint
from megatron_klong.training.launched import is_requeued
from megatron_klong.training.preflight import CheckedInputs, has_weights

_POLL_SECONDS = 0.1

SFT_CHANGEABLE = (
    "data.sources.*.store",
    "log.*",
    "model.deterministic",
    "model.hf_config",
    "model.loss_chunk_tokens",
    "model.preset",
    "model.recompute*",
    "model.weights",
    "optimizer.offload",
    "parallel.*",
    "run.check_memory",
    "run.dir",
    "training.anomalies.*",
    "training.eval_every",
    "training.hang_seconds",
    "training.keep_*",
    "training.save_*",
    "training.stop_seconds",
)
"""Keys that may differ on a resume: they change where inputs stand, how a run is executed and what is done
about trouble, not what it computes. The inputs themselves are compared by content."""


class RunDirectory:
    """Paths of a run, and the check that a directory holds the run that is about to start."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.identity = path / "identity.json"
        self.metrics = path / "metrics.jsonl"
        self.said = path / "run.log"
        self._begun_by = path / ".begun-by-job"
        self.anomalies = path / "anomalies.jsonl"
        self.tensorboard = path / "tensorboard"
        self.wandb = path / "wandb"
        self.heartbeats = path / "heartbeats"
        self.lineage_file = path / "lineage.txt"
        self.summary = path / "summary.json"
        self.checkpoints = path / "checkpoints"
        self.logs = path / "logs"
        self.rollouts = path / "rollouts"
        self.batches = path / "batches"
        self.exchange = path / "exchange"

    @contextmanager
    def locked(self, part: str = "run", *, wait_seconds: float = 0.0) -> Iterator[int]:
        """Hold the directory for one process.

        Yields the file descriptor of the lock: processes that inherit it hold the directory too.

        Args:
            part: what of the run this process is, where several work in one directory.
            wait_seconds: how long to wait for another process that holds it.

        Raises:
            ValueError: another process holds it, or it cannot be written.
        """
        deadline = time.monotonic() + wait_seconds
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / f".{part}.lock").open("a+")
        except OSError as error:
            raise ValueError(f"run.dir={self.path}: {error.strerror}") from error
        with lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        lock.seek(0)
                        raise ValueError(
                            f"run.dir={self.path}: another process is running in it ({part}: "
                            f"{lock.read() or 'unknown'}); wait for it, or choose another directory"
                        ) from None
                    time.sleep(_POLL_SECONDS)
            lock.truncate(0)
            lock.write(_this_process())
            lock.flush()
            yield lock.fileno()

    def may_be_deleted(self, environment: Mapping[str, str]) -> bool:
        """Whether this start may begin the run anew: not after an earlier start of the same job has.

        Raises:
            ValueError: torchrun would start the command again, and nothing tells those starts apart.
        """
        if environment.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
            raise ValueError(
                "--fresh would delete the run at each of torchrun's --max-restarts; leave one out"
            )
        job = environment.get("SLURM_JOB_ID")
        done = is_requeued(environment) and self._begun_by.is_file() and self._begun_by.read_text() == job
        if done:
            print("note: --fresh was done when this job began; the run goes on", file=sys.stderr)
        return not done

    def prepare(
        self, config: BaseModel, identity: dict[str, Any], *, fresh: bool, keep_config: bool = False
    ) -> None:
        """Claim the directory for this run, which may have been started in it before.

        Args:
            config: the resolved config; saved as ``config.yaml``.
            keep_config: leave a ``config.yaml`` that is there: another process of the run wrote it.
            identity: what makes two starts the same run (see :func:`identity_of`).
            fresh: delete an earlier run first; other files in the directory stay.

        Raises:
            ValueError: the directory holds another run, or files that are no run.
        """
        if self.identity.is_file():
            if fresh:
                self._delete_run()
            elif self._has_results():
                self._refuse_other_run(json.loads(self.identity.read_text()), identity)
        elif any(not path.name.startswith(".") for path in self.path.iterdir()):
            raise ValueError(
                f"run.dir={self.path}: holds files that are no run of this package; choose an empty "
                "or new directory"
            )
        if fresh:  # also where there was nothing to delete: this job has a run here from now on
            replace_text(self._begun_by, os.environ.get("SLURM_JOB_ID", ""))
        # The identity first: a directory that has one is a run, whatever else is missing.
        replace_text(self.identity, json.dumps(identity, indent=2) + "\n")
        if not (keep_config and self.config.is_file()):
            replace_text(self.config, dump_config(config))

    def has_checkpoints(self) -> bool:
        """Whether it goes on from one, or none of them is whole."""
        return any(self.checkpoints.glob("step_*"))

    def known(self, key: str) -> object:
        """What the run that is there has of its identity; None without a run."""
        return json.loads(self.identity.read_text()).get(key) if self.identity.is_file() else None

    def lineage(self) -> str:
        """An id of the run that stays when it is started again, and is another one after ``fresh``."""
        if not self.lineage_file.is_file():
            replace_text(self.lineage_file, secrets.token_hex(8))
        return self.lineage_file.read_text()

    def truncate_metrics(self, step: int) -> set[str]:
        """Drop lines after ``step``, which a resumed run writes again; sources whose held-out loss of that
        step stays recorded."""
        if not self.metrics.is_file():
            return set()
        lines = self.metrics.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
        replace_text(self.metrics, "".join(kept))
        records = map(json.loads, kept)
        return {each["source"] for each in records if each["step"] == step and each["kind"] == "validation"}

    def _refuse_other_run(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        nothing = object()  # a key that is not there is not one that is None
        changed = sorted(
            key for key in before.keys() | now.keys() if before.get(key, nothing) != now.get(key, nothing)
        )
        if changed:
            first = changed[0]
            raise ValueError(
                f"run.dir={self.path}: holds a run with other settings: {', '.join(changed)} "
                f"({first} was {before.get(first)!r}, now {now.get(first)!r}); choose another "
                "run.dir, or --fresh to delete that run"
            )

    def _has_results(self) -> bool:
        """Whether anything was trained; a start that failed before may be corrected freely."""
        written = self.metrics.is_file() and self.metrics.stat().st_size > 0
        return written or self.checkpoints.is_dir() or self.rollouts.is_dir()

    def _delete_run(self) -> None:
        """Delete what a run wrote, its identity last: an interrupted deletion can be repeated."""
        for folder in (
            self.checkpoints, self.logs, self.rollouts, self.batches, self.exchange, self.tensorboard,
            self.wandb, self.heartbeats,
        ):  # fmt: skip
            if folder.is_dir():
                shutil.rmtree(folder)
        for path in (
            self.metrics, self.said, self.anomalies, self.lineage_file, self.summary, self.config,
            self.identity,
        ):  # fmt: skip
            path.unlink(missing_ok=True)


def _this_process() -> str:
    job = os.environ.get("SLURM_JOB_ID")
    return f"process {os.getpid()} on {socket.gethostname()}" + (f", Slurm job {job}" if job else "")


def replace_text(file: Path, text: str) -> None:
    """Write a file so that a crash leaves the old text or the new one."""
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(text)
    unfinished.replace(file)


def sft_identity(config: SftConfig, inputs: CheckedInputs, run: RunDirectory) -> dict[str, Any]:
    """What makes two starts the same supervised run.

    Args:
        run: knows the first weights of a run whose weights are no longer where they were.
    """
    contents: dict[str, Any] = {}
    for name, header in inputs.data.items():
        files = store_fingerprint(config.data.sources[name].store)
        contents[f"data.sources.{name}.content"] = [header.content_sha256, files]
    # What follows from keys that are left out, and the order, which decides what is trained when.
    contents["data.mix"] = [[name, *_mix(config, name)] for name in config.data.phases]
    if config.model.weights is not None:
        there = has_weights(config.model.weights)
        weights = weights_fingerprint(config.model.weights) if there else run.known("model.weights.content")
        contents["model.weights.content"] = weights
    return identity_of(config, SFT_CHANGEABLE, inputs.model) | contents


def _mix(config: SftConfig, phase: str) -> Iterator[object]:
    yield config.data.phases[phase].steps
    for name, mix in config.data.mixes(phase).items():
        yield [name, mix.epochs, mix.weight]


def identity_of(config: BaseModel, changeable: tuple[str, ...], model: DecoderConfig) -> dict[str, Any]:
    """What makes two starts the same run: dotted keys to values.

    Args:
        changeable: patterns of keys that may differ.
        model: the shape of the model.
    """
    flat = dict(_flatten(config.model_dump(mode="json")))
    same = {key: value for key, value in flat.items() if not any(map(partial(fnmatch, key), changeable))}
    shape = _flatten(json.loads(json.dumps(asdict(model))), "model.")
    return {**same, **dict(shape)}


def _flatten(values: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield above + key, value
