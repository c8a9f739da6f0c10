"""How much memory a rank has to itself on this machine. Imports no torch: it is asked before a start."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU that this process may use; None where there is none or it cannot be told."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shutil.which("nvidia-smi") is None or visible == "":
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    if visible is not None:
        command.append(f"--id={visible}")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) * 2**20 if done.returncode == 0 and sizes else None


def host_bytes() -> int:
    """Memory of this machine, or of the container or the job's share that this process is in."""
    import psutil

    own = _OWN_CGROUPS.read_text() if _OWN_CGROUPS.is_file() else ""
    return min([int(psutil.virtual_memory().total), *cgroup_limits(own, _CGROUPS)])


def cgroup_limits(own: str, root: Path) -> list[int]:
    """Limits of memory of a process and of all that it is in, bytes.

    Args:
        own: what ``/proc/PID/cgroup`` says: lines of ``number:controllers:/path``, of version 1 or 2.
        root: where the controllers are.
    """
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top, name = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        place = top / path.lstrip("/")
        for folder in (place, *place.parents):
            with contextlib.suppress(OSError, ValueError):  # "max" is none
                found.append(int((folder / name).read_text()))
            if folder == top:
                break
    return found
