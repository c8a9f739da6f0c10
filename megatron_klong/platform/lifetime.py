"""Processes that do not outlive the one they work for."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, how: signal.Signals = signal.SIGTERM) -> None:
    """Ask the kernel to signal this process when the one that started it is gone, however it died.

    The kernel counts the parent's *thread* that started this process: start from one that stays.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)
        if os.getppid() != parent:  # it was gone before we asked
            sys.exit(1)
