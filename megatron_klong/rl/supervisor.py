"""``klong rl CONFIG``: trainer, servers and orchestrator on this machine, started again when they die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from megatron_klong.config import RlConfig
from megatron_klong.platform.lifetime import on_stop_signals
from megatron_klong.rl.exchange import Exchange, Finished
from megatron_klong.rl.prepare import check_rl, check_trainer, claim_run
from megatron_klong.training.run_directory import RunDirectory

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 30.0
_USER_ERROR = 2


@dataclass
class _Child:
    """A role, and its present process."""

    name: str
    arguments: tuple[str, ...]
    log: Path | None
    restarts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None)


class _StoppedError(Exception):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        self.number = number


def supervise(config: RlConfig, *, fresh: bool, say: Callable[[str], None]) -> int:
    """Run all roles until the orchestrator has finished; the exit code.

    The orchestrator prints and shows its progress here; the others write to ``logs/``. If this process is
    killed, the kernel ends them.

    Args:
        fresh: delete an earlier run in the directory first; once, where Slurm starts the job again.
        say: for restarts.

    Raises:
        ValueError: a user's error, found before anything is started.
    """
    checked = check_rl(config)
    ranks = config.parallel.world_size
    check_trainer(config, ranks, ranks)
    run = RunDirectory(config.run.dir)
    fresh = fresh and run.may_be_deleted(os.environ)
    with run.locked():
        with contextlib.ExitStack() as idle:
            if fresh:  # roles may have been started alone, or be on their way out
                for role in ("trainer", "orchestrator", *(f"server-{n}" for n in range(config.servers))):
                    idle.enter_context(run.locked(role, wait_seconds=_GRACE_SECONDS))
            claim_run(run, config, checked, fresh=fresh, role=False)
        if _finished(run):
            say(f"this run has finished: {run.summary}; --fresh starts it anew")
            return 0
        run.logs.mkdir(parents=True, exist_ok=True)
        file = str(run.config)
        children = [
            _Child("trainer", ("trainer", file), run.logs / "trainer.log"),
            *(
                _Child(f"server {n}", ("server", file, "--number", str(n)), run.logs / f"server-{n}.log")
                for n in range(config.servers)
            ),
            _Child("orchestrator", ("orchestrator", file), None),
        ]
        with on_stop_signals(_interrupt):
            try:
                return _watch(run, children, config.max_restarts, say)
            except _StoppedError as stopped:
                say(f"stopped by {signal.Signals(stopped.number).name}; the same command goes on")
                return 128 + stopped.number
            finally:
                _end(children)


def _finished(run: RunDirectory) -> bool:
    return Exchange(run.exchange).heard("finished", Finished) is not None


def _watch(run: RunDirectory, children: list[_Child], most: int, say: Callable[[str], None]) -> int:
    for child in children:
        _start(child)
    orchestrator = children[-1]
    while True:
        for child in children:
            assert child.process is not None
            code = child.process.poll()
            if code is None or (code == 0 and child is not orchestrator):
                continue
            if code == 0 or _finished(run):  # killed after its last word, it has nothing more to do
                return 0
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
            )
            where = f"; its log: {child.log}" if child.log else ""
            if code == _USER_ERROR or child.restarts == most:
                say(f"the {child.name} {how}{_last_line(child)}{where}")
                return code if code > 0 else 1
            child.restarts += 1
            say(f"the {child.name} {how}; started again ({child.restarts} of {most}){where}")
            _start(child)
        time.sleep(_POLL_SECONDS)


def _start(child: _Child) -> None:
    environment = {**os.environ, "KLONG_PARENT": str(os.getpid())}
    with contextlib.ExitStack() as opened:
        output = opened.enter_context(child.log.open("ab")) if child.log else None
        child.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_klong.cli", "rl", *child.arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            start_new_session=True,  # a terminal's Ctrl-C reaches only us
        )  # fmt: skip


def _last_line(child: _Child) -> str:
    if child.log is None:
        return ""
    lines = child.log.read_text(errors="replace").splitlines()
    return f": {lines[-1]}" if lines else ""


def _end(children: list[_Child]) -> None:
    """End all: politely, then by force."""
    running = [child.process for child in children if child.process is not None]
    for process in running:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
    for process in running:
        if process.poll() is None:
            process.kill()  # what it started ends with it
        process.wait()


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise _StoppedError(number)
