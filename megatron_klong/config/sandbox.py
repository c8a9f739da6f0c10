"""Settings of the sandboxes that agents work in and submissions are graded in."""

from __future__ import annotations

from pydantic import Field

from megatron_klong.config.base import StrictModel


class SandboxConfig(StrictModel):
    """Limits of one sandbox. None of them can be passed from inside."""

    memory_mib: int = Field(default=1024, ge=32)
    """Memory, MiB: of each process, and of all together where the machine has a memory cgroup that we
    may write. Files of the sandbox lie in memory, and count."""

    processes: int = Field(default=64, ge=8)
    """Processes and threads at one time."""

    disk_mib: int = Field(default=64, ge=1)
    """Size of the working folder, MiB, and as much again for temporary files."""

    output_kib: int = Field(default=64, ge=1)
    """Most of a command's output that is kept, KiB: its head and its tail."""

    command_seconds: float = Field(default=60.0, gt=0)
    """Longest run of one command."""
