"""Whether this process was started as one rank of many, and by whom."""

from __future__ import annotations

import re
from collections.abc import Mapping

_FIRST_PORT, _PORTS = 15000, 15000


def rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """What torch wants to know of a rank, in torchrun's words: ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...

    srun has words of its own, which are translated. What is set already stays.

    Returns:
        None, where this process stands alone and starts its own ranks: also in a batch script, before srun.

    Raises:
        ValueError: an srun of several nodes whose list of nodes cannot be read.
    """
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    given = {name: environment[name] for name in names if name in environment}
    if {"RANK", "WORLD_SIZE"} <= given.keys():
        return given
    # The batch step has a SLURM_PROCID too, but no step id; an interactive shell is a step of one task.
    if not {"SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"} <= environment.keys():
        return None
    if environment["SLURM_STEP_NUM_TASKS"] == "1":
        return None
    job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
    nodes = environment.get("SLURM_STEP_NODELIST", "")
    alone = environment.get("SLURM_STEP_NUM_NODES") == "1"
    return {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment["SLURM_LOCALID"],
        "WORLD_SIZE": environment["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": "127.0.0.1" if alone else first_node(nodes),
        "MASTER_PORT": str(_FIRST_PORT + (job + step) % _PORTS),
        **given,
    }


def is_requeued(environment: Mapping[str, str]) -> bool:
    """Whether Slurm has started this job before."""
    return environment.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def nodes(environment: Mapping[str, str]) -> int:
    """Machines that the ranks of this process's launch are on: 1 where it starts its own."""
    if rank_environment(environment) is None:
        return 1
    if "LOCAL_WORLD_SIZE" in environment:  # torchrun's
        return max(1, int(environment["WORLD_SIZE"]) // int(environment["LOCAL_WORLD_SIZE"]))
    return int(environment.get("SLURM_STEP_NUM_NODES", "1"))


def first_node(nodes: str) -> str:
    """The first of a list as Slurm writes it: ``h100-[003-007,012]`` is ``h100-003``.

    Raises:
        ValueError: it is none.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\w+)[^\]]*\]([^,\[\]]*))?", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} names no node; set MASTER_ADDR to that of rank 0")
    before, number, after = match.groups(default="")
    return before + number + after
