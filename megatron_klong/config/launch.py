"""Settings of ``klong launch``: steps, each a command of ``klong``, and where they run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]*$")]
Duration = Annotated[str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$")]
"""As Slurm writes it: ``24:00:00``, or ``7-00:00:00`` for a week."""


class NodesConfig(StrictModel):
    """What a step takes on Slurm."""

    count: int = Field(default=1, ge=1)
    """Nodes."""
    tasks: int = Field(default=1, ge=1)
    """Tasks of a node: one for each GPU where the step trains."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a node."""
    cpus: int | None = Field(default=None, ge=1)
    """CPUs of a task. Default: ``slurm.cpus_per_task``."""


class RolesConfig(StrictModel):
    """What the roles of reinforcement learning take on Slurm, where they are on different nodes."""

    server: NodesConfig
    """Each task is a server: ``servers`` of the run's config becomes their number. Those of one node share
    its GPUs out, ``server.tensor_parallel`` to each."""
    trainer: NodesConfig
    orchestrator: NodesConfig = NodesConfig()


class StepConfig(StrictModel):
    """One job: a command of ``klong``, after others."""

    run: tuple[str, ...] = Field(min_length=1)
    """Arguments of ``klong``; paths are seen from ``home``."""
    after: tuple[Name, ...] = ()
    """Steps that must be done before."""
    nodes: NodesConfig = NodesConfig()
    """On Slurm. Elsewhere ``klong`` starts its own ranks on the one machine."""
    roles: RolesConfig | None = None
    """On Slurm, for ``klong rl`` on several nodes, in place of ``nodes``."""
    time: Duration | None = None
    """On Slurm, the time limit, where it is not that of ``slurm.time``."""

    @property
    def resumes(self) -> bool:
        """Whether it saves when it is told to stop, and goes on from there."""
        return self.run[0] in ("sft", "rl")

    @model_validator(mode="after")
    def _fields_agree(self) -> StepConfig:
        if self.roles is not None and self.run[0] != "rl":
            raise ValueError(f"roles are of `klong rl`, not of `klong {self.run[0]}`; say nodes instead")
        if self.run[0] in ("sft", "rl") and (len(self.run) < 2 or self.run[1].startswith("-")):
            raise ValueError(
                f"run: name the config right after {self.run[0]!r}, before overrides and options"
            )
        if self.roles is not None and any(word.startswith("-") for word in self.run):
            raise ValueError("run: with roles there are no options, only overrides (key=value)")
        if "--fresh" in self.run:
            raise ValueError(
                "run: --fresh would delete the run whenever the step goes on; delete its run.dir by hand"
            )
        for argument in self.run:
            if "/nemo_run" in argument:
                raise ValueError(f"run: {argument!r} holds '/nemo_run', which nemo-run rewrites; rename it")
        return self


class SlurmLaunchConfig(StrictModel):
    """The cluster."""

    account: str
    """Who pays; nemo-run wants one."""
    partition: str | None = None
    time: Duration = "24:00:00"
    cpus_per_task: int = Field(default=12, ge=1)
    """Of every task of every step that does not say its own."""
    exclusive: bool = True
    """Whole nodes."""
    signal_seconds: int = Field(default=600, ge=0)
    """So long before the time limit `klong sft` and `klong rl` are told to save and end, and queued again."""
    requeues: int = Field(default=50, ge=0)
    """How often."""
    image: str | None = None
    """A container for pyxis; none: ``venv``."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, beside ``home`` and ``state``."""
    environment: dict[str, str] = {}
    """Set in the batch script, in clear: no secrets. What you submit with is passed on by Slurm; into a
    container go these, WANDB_API_KEY, and what NCCL reads."""
    options: dict[str, str] = {}
    """More options of sbatch, such as ``qos`` or ``reservation``."""


class DockerLaunchConfig(StrictModel):
    """Containers on this machine."""

    image: str
    """Made by docker/Dockerfile, or docker/Dockerfile.cpu."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, beside ``home`` and ``state``."""
    gpus: int = Field(default=0, ge=-1)
    """Devices of a container; -1: all."""
    shm_size: str = "32g"
    """Shared memory, which NCCL and data workers use."""
    network: str = "host"
    privileged: bool = False
    """Sandboxes need it (docker/README.md); training alone does not."""


class LaunchConfig(StrictModel):
    """An experiment: steps that depend on one another, on one executor.

    A step that is done is not done again when the experiment is launched again with the same command.
    """

    name: Name
    home: Path = Path(".")
    """The checkout, on a file system that all nodes see."""
    state: Path
    """What is done, logs, and nemo-run's own files; on a file system that all nodes see."""
    venv: Path = Path(".venv")
    """The environment of ``make install``, seen from ``home``; not that of ``klong launch`` itself."""
    executor: Literal["local", "slurm", "docker"] = "local"
    slurm: SlurmLaunchConfig | None = None
    docker: DockerLaunchConfig | None = None
    steps: dict[Name, StepConfig] = Field(min_length=1)

    @property
    def contained(self) -> bool:
        """Whether steps run in containers, which have their own software."""
        return self.executor == "docker" or (
            self.executor == "slurm" and self.slurm is not None and self.slurm.image is not None
        )

    @model_validator(mode="after")
    def _fields_agree(self) -> LaunchConfig:
        if self.executor != "local" and getattr(self, self.executor) is None:
            raise ValueError(f"executor={self.executor} needs the section {self.executor}:")
        for name, step in self.steps.items():
            limit = step.time or (self.slurm.time if self.slurm else None)
            if self.slurm and limit and step.resumes and _seconds(limit) <= self.slurm.signal_seconds:
                raise ValueError(
                    f"steps.{name}: a time limit of {limit} is over before slurm.signal_seconds="
                    f"{self.slurm.signal_seconds} are; make it longer"
                )
        earlier: set[str] = set()
        for name, step in self.steps.items():
            if not set(step.after) <= earlier:
                first = min(set(step.after) - earlier)
                raise ValueError(f"steps.{name}.after: {first} is no step before it; put it there")
            earlier.add(name)
        for field, path in (("home", self.home), ("state", self.state), ("venv", self.venv)):
            if re.search(r"/nemo_run", str(path.absolute())):
                raise ValueError(f"{field}={path} holds '/nemo_run', which nemo-run rewrites; choose another")
        return self


def _seconds(duration: str) -> int:
    days, _, time = duration.rpartition("-")
    hours, minutes, seconds = map(int, time.split(":"))
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
