"""The jobs of a launch on Slurm, by their numbers in ``STATE/STEP.job``."""

from __future__ import annotations

import subprocess

from megatron_klong.config import LaunchConfig


def remember(config: LaunchConfig, name: str, job: str) -> None:
    """Keep the number of a step's job."""
    (config.state / f"{name}.job").write_text(job)


def check_no_live_jobs(config: LaunchConfig) -> None:
    """Refuse to submit steps whose jobs are in the queue.

    Raises:
        ValueError: one is; names it and what to do.
    """
    for name in config.steps:
        file = config.state / f"{name}.job"
        if not file.is_file():
            continue
        job = file.read_text()
        # Of a job that Slurm has forgotten squeue says so and fails.
        asked = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%T"],
            capture_output=True,
            text=True,
            check=False,
        )
        if state := "".join(asked.stdout.split()[:1]):
            raise ValueError(
                f"step {name} of {config.name} is job {job} ({state}); wait for it, or end it: scancel {job}"
            )


def cancel(jobs: list[str]) -> None:
    """Take jobs from the queue."""
    if jobs:
        subprocess.run(["scancel", *jobs], capture_output=True, check=False)
