"""nemo-run's executors, as the settings of a launch want them."""

from __future__ import annotations

import os
from typing import Any

from megatron_klong.config import DockerLaunchConfig, LaunchConfig, NodesConfig, SlurmLaunchConfig
from megatron_klong.launch.scripts import batch_setup

_INTO_CONTAINERS = (
    "CUDA_DEVICE_MAX_CONNECTIONS", "GLOO_SOCKET_IFNAME", "KLONG_OUTCOME", "KLONG_SERVER_ADDRESS",
    "KLONG_SERVER_HOST", "MASTER_ADDR", "NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_NVLS_ENABLE", "NCCL_SOCKET_IFNAME",
    "OMP_NUM_THREADS", "PYTHONFAULTHANDLER", "PYTHONUNBUFFERED", "WANDB_API_KEY",
)  # fmt: skip
"""What must win over an image's own values, which pyxis prefers."""


def executor(config: LaunchConfig, name: str, nodes: NodesConfig) -> Any:
    """The executor of one kind of a step's tasks."""
    import nemo_run

    home, state = config.home.absolute(), config.state.absolute()
    ours = (f"{home}:{home}", f"{state}:{state}")
    if config.executor == "docker":
        assert config.docker is not None
        return _docker(config.docker, ours)
    if config.executor == "slurm":
        assert config.slurm is not None
        return _slurm(config, config.slurm, name, nodes, ours)
    # The checkout is where it is: nothing is packed.
    return nemo_run.LocalExecutor(packager=nemo_run.Packager())


def _docker(docker: DockerLaunchConfig, ours: tuple[str, ...]) -> Any:
    import nemo_run

    return nemo_run.DockerExecutor(
        container_image=docker.image,
        num_gpus=docker.gpus or None,
        shm_size=docker.shm_size,
        network=docker.network,
        privileged=docker.privileged,
        volumes=[*ours, *docker.mounts],
        # What it writes belongs to who launches it, who is nobody in the image and has no home there.
        additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}"},
        env_vars={"HOME": "/tmp"},
        packager=nemo_run.Packager(),
    )


def _slurm(
    config: LaunchConfig, slurm: SlurmLaunchConfig, name: str, nodes: NodesConfig, ours: tuple[str, ...]
) -> Any:
    import nemo_run

    step = config.steps[name]
    cpus = nodes.cpus or slurm.cpus_per_task
    # Slurm from 22.05 to 23.02 does not take the CPUs of a task from the job. Ranks may end minutes apart,
    # when one of them writes.
    srun = [f"--cpus-per-task={cpus}", "--wait=0"]
    if slurm.image:
        # The home would bring packages of its own.
        srun += ["--no-container-mount-home", "--container-writable"]
    return nemo_run.SlurmExecutor(
        account=slurm.account,
        partition=slurm.partition,
        job_name_prefix="klong-",
        time=step.time or slurm.time,
        nodes=nodes.count,
        ntasks_per_node=nodes.tasks,
        gpus_per_node=nodes.gpus,
        # Of a heterogeneous job nemo-run gives all components the first one's.
        cpus_per_task=slurm.cpus_per_task if step.roles else cpus,
        mem="0" if slurm.exclusive else None,
        exclusive=slurm.exclusive or None,
        signal=f"TERM@{slurm.signal_seconds}" if slurm.signal_seconds and step.resumes else None,
        container_image=slurm.image,
        container_mounts=[*ours, *slurm.mounts] if slurm.image else [],
        container_env=[*_INTO_CONTAINERS, *slurm.environment] if slurm.image else None,
        # What needs a step that has failed goes from the queue.
        additional_parameters={"kill_on_invalid_dep": "yes", **slurm.options},
        srun_args=srun,
        setup_lines=batch_setup(config, name),
        wait_time_for_group_job=0,
        # Roles end together (scripts.py); so long after a failure the others are ended.
        monitor_group_job_wait_time=10,
        poll_estimated_start_time=False,
        tunnel=nemo_run.LocalTunnel(job_dir=""),
        packager=nemo_run.Packager(),
    )
