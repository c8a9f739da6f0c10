"""Starts the ranks of one node, watches them, and leaves none behind."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from megatron_klong.platform.lifetime import on_stop_signals
from megatron_klong.training.rank_entry import MOST_REPORTED, REPORT_TO

_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_CAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class Rank:
    """A started rank.

    Attributes:
        log: has its stderr.
        report: file descriptor of a pipe in which it leaves why it ends (the log may be on a full disk).
    """

    number: int
    process: subprocess.Popen[bytes]
    log: Path
    report: int


class _InterruptedError(Exception):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        self.number = number


def run_ranks(
    module: str,
    arguments: Sequence[str],
    nproc: int,
    logs: Path,
    *,
    stop_seconds: float = 0.0,
    keep_open: Sequence[int] = (),
) -> int:
    """Run ``python -m module`` on ``nproc`` ranks and wait; returns the exit code.

    Rank 0 prints to this process's stdout; every rank's stderr goes to ``logs/rank_N.log``. When
    one fails, or on SIGINT, SIGTERM or SIGHUP, all are ended, with everything they started. If this
    process is killed, the kernel tells them to end by SIGTERM.

    Args:
        stop_seconds: on such a signal, pass it on and give the ranks so long to end by themselves; a second
            signal ends them at once.
        keep_open: file descriptors that the ranks inherit.

    Returns:
        0; the exit code of the first rank that failed; or 128 + the signal's number.
    """
    logs.mkdir(parents=True, exist_ok=True)
    ranks: list[Rank] = []
    with on_stop_signals(_interrupt) as caught:
        try:
            port = _free_port()
            for number in range(nproc):
                ranks.append(_start(module, arguments, number, nproc, port, logs, keep_open))
            failed = _wait(ranks)
            return _failure(failed) if failed is not None else 0
        except _InterruptedError as interruption:
            return _stop(ranks, interruption.number, stop_seconds)
        finally:
            for signum in caught:
                signal.signal(signum, signal.SIG_IGN)
            _end(ranks)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise _InterruptedError(number)


def _stop(ranks: list[Rank], number: int, seconds: float) -> int:
    """Let the ranks end by themselves, as far as there is time; the exit code."""
    name = signal.Signals(number).name
    with contextlib.suppress(_InterruptedError):  # asked twice
        if seconds:
            _say(
                f"{name}: the ranks end their step and save, for at most {seconds:g} s; again to end them at "
                "once"
            )
            for rank in ranks:
                rank.process.send_signal(number)
            _wait_for_end(ranks, seconds)
    failed = [rank for rank in ranks if _has_failed(rank) and rank.process.returncode != -number]
    if failed:
        return _failure(min(failed, key=_says_little))
    if all(rank.process.poll() == 0 for rank in ranks):
        return 0  # it was at its end
    running = [str(rank.number) for rank in ranks if rank.process.poll() is None]
    lost = f" without rank {', '.join(running)}; what was not saved is lost" if seconds and running else ""
    _say(f"stopped by {name}{lost}")
    return 128 + number


def _wait_for_end(ranks: list[Rank], seconds: float) -> None:
    """Until all have ended, or time is up, or one has failed, for which the others would wait."""
    deadline = time.monotonic() + seconds
    while any(rank.process.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(map(_has_failed, ranks)):
            time.sleep(_CAUSE_SECONDS)
            return
        time.sleep(_POLL_SECONDS)


def _has_failed(rank: Rank) -> bool:
    """Whether it has ended, and not as one that was asked to."""
    stopped = {0, *(128 + number for number in signal.Signals)}
    return rank.process.poll() is not None and rank.process.returncode not in stopped


def _failure(rank: Rank) -> int:
    _say(_explain(rank))
    return rank.process.returncode if rank.process.returncode > 0 else 1


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # a terminal that is gone
        print(text, file=sys.stderr, flush=True)


def _start(
    module: str,
    arguments: Sequence[str],
    number: int,
    nproc: int,
    port: int,
    logs: Path,
    keep_open: Sequence[int],
) -> Rank:
    environment = {
        # With several ranks on few cores, threads of one rank only get in another's way.
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // nproc)),
        # One node: gloo need not ask what the host name resolves to.
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(nproc),
        "KLONG_LAUNCHER": str(os.getpid()),
    }
    log = logs / f"rank_{number}.log"
    report, said = os.pipe()
    os.set_blocking(report, False)
    with log.open("ab") as stderr, open(said, "wb"):  # a restart keeps the log of what failed before
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env=environment | {REPORT_TO: str(said)},
            stdin=subprocess.DEVNULL,
            stdout=None if number == 0 else stderr,
            stderr=stderr,
            pass_fds=(*keep_open, said),
            start_new_session=True,  # a terminal's Ctrl-C reaches only us, and we end the group
        )
    return Rank(number, process, log, report)


def _wait(ranks: list[Rank]) -> Rank | None:
    """Until all have ended well (None), or one has failed (the one that says why)."""
    while None in (codes := [rank.process.poll() for rank in ranks]):  # all are asked: any may fail first
        if any(codes):
            # The cause may still be on its way out while ranks that lost their peer are gone.
            time.sleep(_CAUSE_SECONDS)
            break
        time.sleep(_POLL_SECONDS)
    failed = [rank for rank in ranks if rank.process.poll()]
    return min(failed, key=_says_little, default=None)


def _says_little(rank: Rank) -> tuple[int, int]:
    """Order of failures: a user's error (2) says most, then a kill, then an exception."""
    code = rank.process.returncode
    return (0 if code == 2 else 1 if code < 0 else 2), rank.number


def _explain(rank: Rank) -> str:
    code = rank.process.returncode
    with contextlib.suppress(BlockingIOError):  # it said nothing, and something that it started lives
        if said := os.read(rank.report, MOST_REPORTED):
            return said.decode(errors="replace")
    lines = rank.log.read_text(errors="replace").splitlines()
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
    return "\n".join([*lines[-20:], f"error: rank {rank.number} {ended}; its log: {rank.log}"])


def _end(ranks: list[Rank]) -> None:
    """End the process groups of all ranks: politely, then by force."""
    _signal(ranks, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_SECONDS
    while time.monotonic() < deadline and any(rank.process.poll() is None for rank in ranks):
        time.sleep(_POLL_SECONDS)
    _signal(ranks, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()
        os.close(rank.report)


def _signal(ranks: list[Rank], number: signal.Signals) -> None:
    for rank in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(rank.process.pid, number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
