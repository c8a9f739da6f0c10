"""What outlives a process and what does not: its children, its hold on a folder, what it has written."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, how: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when the one that started it is gone, however it died.

    The kernel counts the parent's *thread* that started this process: start from one that stays.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:  # it was gone before we asked
            sys.exit(1)


@contextmanager
def on_stop_signals(handler: Callable[[int, FrameType | None], None]) -> Iterator[tuple[signal.Signals, ...]]:
    """Within, SIGINT, SIGTERM and SIGHUP are handled; yields those of them that are.

    What this process was started to ignore (by nohup, or as a shell's background job) stays ignored.
    """
    stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    caught = tuple(number for number in stops if signal.getsignal(number) is not signal.SIG_IGN)
    before = {number: signal.signal(number, handler) for number in caught}
    try:
        yield caught
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def held_folder(folder: Path, taken: str) -> Iterator[None]:
    """Make a folder, and hold it for this process; it may be removed or renamed meanwhile.

    Raises:
        ValueError: with the text ``taken``, when another process has it.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if folder.exists() and os.fstat(handle).st_ino == folder.stat().st_ino:
                yield
                return
        except BlockingIOError:
            raise ValueError(taken) from None
        finally:
            os.close(handle)  # of a folder that another one removed meanwhile: make it again
