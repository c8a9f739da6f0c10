"""A bound on the memory of all processes of a sandbox together, where this machine lets us set one."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_LEAVE_SECONDS = 2.0


class MemoryGroup:
    """A memory cgroup, of version 1 or 2.

    Attributes:
        procs: the file that a process writes its pid to, to join.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.procs = folder / "cgroup.procs"

    def close(self) -> None:
        """Remove it, once its processes are gone."""
        deadline = time.monotonic() + _LEAVE_SECONDS
        while self._folder.is_dir() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self._folder.rmdir()
                return
            time.sleep(0.005)


def remove_left_groups(mark: str) -> None:
    """Remove groups named ``MARK-PID-...`` of processes that are gone without having closed theirs."""
    for parent in (_ROOT / "memory", _ROOT):
        for folder in parent.glob(f"{mark}-*-*"):
            if not Path("/proc", folder.name.split("-")[1]).exists():
                with contextlib.suppress(OSError):
                    folder.rmdir()


def memory_group(name: str, limit_bytes: int) -> MemoryGroup | None:
    """A new group with that limit; None where there is no controller, or we may not use it."""
    for parent, file in ((_ROOT / "memory", "memory.limit_in_bytes"), (_ROOT, "memory.max")):
        group = MemoryGroup(parent / name)
        try:
            (parent / name).mkdir()
        except OSError:
            continue
        try:
            # Opened without making it: a folder without this file has no memory controller.
            with (parent / name / file).open("r+") as limit:
                limit.write(str(limit_bytes))
            return group
        except OSError:
            group.close()
    return None
