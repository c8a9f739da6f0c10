"""The same steps as a nemo-run experiment on any of three executors."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.config import LaunchConfig
from megatron_klong.launch.scripts import (
    TaskScript,
    batch_setup,
    done_file,
    failed_file,
    is_done,
    step_scripts,
)

SUPPORTED_NEMO_RUN = "0.11."
"""Prefix of the versions whose treatment of scripts, states and dependencies this was written for."""


@dataclass(frozen=True)
class Launched:
    """What became of a step.

    Attributes:
        name: the step's.
        state: ``done``, ``done before``, ``failed``, ``not started``, or on Slurm ``submitted``.
        job: the job's number on Slurm.
        folder: where its logs are.
        exit_code: of a failed step, where it is known.
    """

    name: str
    state: str
    folder: Path
    job: str | None = None
    exit_code: int | None = None


def dry_run(config: LaunchConfig) -> dict[str, str]:
    """What each step would run, by its name: on Slurm the batch script, elsewhere the task's script.

    Nothing is started, and nothing is left on disk.
    """
    if config.executor != "slurm":
        return {name: step_scripts(config, name)[0].text for name in config.steps}
    with _experiment(config) as experiment:
        for name in config.steps:
            _add(experiment, config, name)
        folder = Path(experiment._exp_dir)
        try:
            experiment.dryrun(log=False, delete_exp_dir=False)
            batch = {name: next(folder.glob(f"{name}*_sbatch.sh")).read_text() for name in config.steps}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        return batch


def launch(config: LaunchConfig) -> list[Launched]:
    """Run the steps in their order; on Slurm, submit them with their dependencies.

    Blocks until all have ended, but not on Slurm. Steps that are done already are left out.

    Raises:
        ValueError: the executor cannot be had here.
    """
    _check_executor(config)
    config.state.mkdir(parents=True, exist_ok=True)
    todo = [name for name in config.steps if not is_done(config, name)]
    for name in todo:
        failed_file(config, name).unlink(missing_ok=True)
    with _experiment(config) as experiment:
        for name in todo:
            _add(experiment, config, name, among=todo)
        if todo:
            _run(experiment, on_slurm=config.executor == "slurm")
        jobs = {job.id: job for job in experiment.jobs}
    # Jobs that wait for nothing have ended only now.
    return [_launched(config, name, jobs.get(name)) for name in config.steps]


def _run(experiment: Any, *, on_slurm: bool) -> None:
    from invoke.exceptions import UnexpectedExit

    try:
        experiment.run(detach=on_slurm, tail_logs=not on_slurm)
    except UnexpectedExit as error:  # of sbatch
        said = " / ".join(line.strip() for line in error.result.stderr.splitlines() if line.strip())
        raise ValueError(f"{error.result.command.split()[0]} refused: {said}") from error


def _launched(config: LaunchConfig, name: str, job: Any) -> Launched:
    if job is None:
        return Launched(name, "done before", config.state)
    executors = job.executors if hasattr(job, "executors") else job.executor
    folder = Path((executors[0] if isinstance(executors, list) else executors).job_dir)
    if config.executor == "slurm":
        handle = job.handles[0] if hasattr(job, "handles") else job.handle
        return Launched(name, "submitted", folder, job=handle.partition("://")[2].split("/")[1])
    if is_done(config, name):
        return Launched(name, "done", folder)
    failed = failed_file(config, name)
    if failed.is_file():
        return Launched(name, "failed", folder, exit_code=int(failed.read_text()))
    needed = config.steps[name].after
    started = all(is_done(config, each) for each in needed)
    return Launched(name, "stopped" if started else "not started", folder)


def _check_executor(config: LaunchConfig) -> None:
    if not (config.home / "slurm" / "launched.sh").is_file():
        raise ValueError(f"home={config.home} is no checkout of megatron_klong; name one")
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("executor=slurm: no sbatch here; launch from a node that submits jobs")
    klong = (config.home / config.venv).absolute() / "bin" / "klong"
    if not config.contained and not klong.is_file():
        raise ValueError(f"venv={config.venv}: no {klong}; run make install there, or name another")


@contextlib.contextmanager
def _experiment(config: LaunchConfig) -> Iterator[Any]:
    # Read when nemo_run is imported, and needed on the file system that the nodes see.
    os.environ["NEMORUN_HOME"] = str(config.state.absolute())
    try:
        import nemo_run
    except ImportError as error:
        raise ValueError(
            f"nemo-run cannot be imported ({error}); it has an environment of its own: make launch-env, "
            "then .venv-launch/bin/klong launch"
        ) from error
    if not nemo_run.__version__.startswith(SUPPORTED_NEMO_RUN):
        raise ValueError(
            f"nemo-run {nemo_run.__version__} is not {SUPPORTED_NEMO_RUN}*; make launch-env installs that"
        )
    with nemo_run.Experiment(
        config.name,
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    ) as experiment:
        yield experiment


def _add(experiment: Any, config: LaunchConfig, name: str, among: list[str] | None = None) -> None:
    """Add a step; of the steps it waits for, those that are done already are no jobs."""
    import nemo_run

    scripts = step_scripts(config, name)
    executors = [_executor(config, name, script) for script in scripts]
    tasks = [nemo_run.Script(inline=script.text) for script in scripts]
    after = [each for each in config.steps[name].after if among is None or each in among]
    if len(tasks) == 1:
        experiment.add(tasks[0], executor=executors[0], name=name, dependencies=after)
    else:
        executors[0].heterogeneous = True
        experiment.add(tasks, executor=executors, name=name, dependencies=after)


def _executor(config: LaunchConfig, name: str, script: TaskScript) -> Any:
    import nemo_run

    home, state = config.home.absolute(), config.state.absolute()
    ours = (f"{home}:{home}", f"{state}:{state}")
    packager = nemo_run.Packager()  # the checkout is where it is: nothing is packed
    if config.executor == "local":
        return nemo_run.LocalExecutor(packager=packager)
    if config.executor == "docker":
        docker = config.docker
        assert docker is not None
        return nemo_run.DockerExecutor(
            container_image=docker.image,
            num_gpus=docker.gpus or None,
            shm_size=docker.shm_size,
            network=docker.network,
            volumes=[*ours, *docker.mounts],
            # What it writes belongs to who launches it, who is nobody in the image and has no home there.
            additional_kwargs={"user": f"{os.getuid()}:{os.getgid()}", "security_opt": list(docker.security)},
            env_vars={"HOME": "/tmp"},
            packager=packager,
        )
    slurm = config.slurm
    assert slurm is not None
    time = config.steps[name].time or slurm.time
    return nemo_run.SlurmExecutor(
        account=slurm.account,
        partition=slurm.partition,
        job_name_prefix="klong-",
        time=time,
        nodes=script.nodes.count,
        ntasks_per_node=script.nodes.tasks,
        gpus_per_node=script.nodes.gpus,
        cpus_per_task=slurm.cpus_per_task,
        mem="0" if slurm.exclusive else None,
        exclusive=slurm.exclusive or None,
        signal=f"TERM@{slurm.signal_seconds}" if slurm.signal_seconds else None,
        container_image=slurm.image,
        container_mounts=[*ours, *slurm.mounts] if slurm.image else [],
        env_vars=dict(slurm.environment),
        additional_parameters=dict(slurm.options),
        # Slurm from 22.05 to 23.02 does not take the CPUs of a task from the job.
        srun_args=[f"--cpus-per-task={slurm.cpus_per_task}"],
        setup_lines=batch_setup(config, name),
        wait_time_for_group_job=0,
        # Roles end together (scripts.py); so long after a failure the others are ended.
        monitor_group_job_wait_time=10,
        poll_estimated_start_time=False,
        tunnel=nemo_run.LocalTunnel(job_dir=""),
        packager=packager,
    )


def forget(config: LaunchConfig, steps: list[str]) -> None:
    """Forget that steps are done, so that they are done again.

    Raises:
        ValueError: no such step.
    """
    for name in steps:
        if name not in config.steps:
            raise ValueError(f"--again {name}: no such step; there are {', '.join(config.steps)}")
        done_file(config, name).unlink(missing_ok=True)
