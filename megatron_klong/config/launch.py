"""Settings of ``klong launch``: steps, each a command of ``klong``, and where they run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from megatron_klong.config.base import StrictModel

_NAME = r"[a-z][a-z0-9-]*"
Name = Annotated[str, Field(pattern=f"^{_NAME}$")]


class NodesConfig(StrictModel):
    """What a step takes on Slurm."""

    count: int = Field(default=1, ge=1)
    """Nodes."""
    tasks: int = Field(default=1, ge=1)
    """Tasks of a node: one for each GPU where the step trains."""
    gpus: int = Field(default=0, ge=0)
    """GPUs of a node."""


class RolesConfig(StrictModel):
    """What the roles of reinforcement learning take on Slurm, where they are on different nodes."""

    server: NodesConfig
    """Each task is a server: ``servers`` of the run's config becomes their number."""
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
    time: str | None = None
    """On Slurm, the time limit, where it is not that of ``slurm.time``."""

    @model_validator(mode="after")
    def _fields_agree(self) -> StepConfig:
        if self.roles is not None and self.run[0] != "rl":
            raise ValueError(f"roles are of `klong rl`, not of `klong {self.run[0]}`; say nodes instead")
        for argument in self.run:
            if "/nemo_run" in argument:
                raise ValueError(f"run: {argument!r} holds '/nemo_run', which nemo-run rewrites; rename it")
        return self


class SlurmLaunchConfig(StrictModel):
    """The cluster."""

    account: str
    """Who pays; nemo-run wants one."""
    partition: str | None = None
    time: str = "24:00:00"
    cpus_per_task: int = Field(default=12, ge=1)
    """Of every task of every step."""
    exclusive: bool = True
    """Whole nodes."""
    signal_seconds: int = Field(default=600, ge=0)
    """So long before the time limit a step is told to save and end; it is queued again."""
    requeues: int = Field(default=50, ge=0)
    """How often a step that ended before its time limit is queued again."""
    image: str | None = None
    """A container for pyxis; none: ``venv``."""
    mounts: tuple[str, ...] = ()
    """SOURCE:TARGET, beside ``home`` and ``state``."""
    environment: dict[str, str] = {}
    """Set in the batch script, in clear: no secrets. What you submit with is passed on by Slurm."""
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
    security: tuple[str, ...] = ()
    """Docker's ``--security-opt``; sandboxes need the three in docker/README.md."""


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
