"""How much memory a rank has to itself on this machine. Imports no torch: it is asked before a start."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

_CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


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
    """Memory of this machine, or of the container that this process is in."""
    import psutil

    limits = [file.read_text().strip() for file in _CGROUP_LIMITS if file.is_file()]
    return min(int(psutil.virtual_memory().total), *(int(limit) for limit in limits if limit.isdigit()))
