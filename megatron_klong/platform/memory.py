"""How much memory a rank has to itself on this machine. Imports no torch: it is asked before a start."""

from __future__ import annotations

import shutil
import subprocess


def gpu_bytes() -> int | None:
    """Memory of the smallest GPU that ``nvidia-smi`` lists, or None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    sizes = [int(line) for line in done.stdout.split() if line.isdigit()]
    return min(sizes) * 2**20 if done.returncode == 0 and sizes else None


def host_bytes() -> int:
    """Memory of this machine."""
    import psutil

    return int(psutil.virtual_memory().total)
