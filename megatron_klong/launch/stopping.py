"""SIGINT, SIGTERM and SIGHUP to a launch reach the step that runs, which saves and ends.

nemo-run starts each step in a session of its own, where no signal of the terminal comes, and waits for it in
a thread, whom no exception of the main thread ends.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_klong.platform.lifetime import on_stop_signals


@contextlib.contextmanager
def stopping(experiment: str) -> Iterator[None]:
    """While it lasts, signals are passed on to an experiment's steps, on this machine or in containers."""

    def pass_on(_number: int, _frame: FrameType | None) -> None:
        print("stopping: the step saves and ends", file=sys.stderr, flush=True)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGTERM)
        _stop_containers(experiment)

    with on_stop_signals(pass_on):
        yield


def _children() -> list[int]:
    """Processes that threads of this one have started, each the first of a session."""
    found = []
    for listed in Path("/proc/self/task").glob("*/children"):
        found += [int(pid) for pid in listed.read_text().split()]
    return [pid for pid in found if os.getpgid(pid) == pid]


def _stop_containers(experiment: str) -> None:
    if "docker" not in sys.modules:
        return
    docker: Any = importlib.import_module("docker")
    with contextlib.suppress(docker.errors.DockerException):
        for container in docker.from_env().containers.list(
            filters={"label": f"nemo-run/experiment-id={experiment}"}
        ):
            # Its first process is a shell, which passes nothing on.
            container.exec_run(["pkill", "-TERM", "-o", "-f", "bin/klong "])
