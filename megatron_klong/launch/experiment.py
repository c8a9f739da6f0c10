"""The same steps as a nemo-run experiment on any of three executors."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.config import LaunchConfig
from megatron_klong.launch.executors import executor
from megatron_klong.launch.jobs import cancel, check_no_live_jobs, remember
from megatron_klong.launch.scripts import done_file, is_done, outcome_folder, step_scripts
from megatron_klong.launch.stopping import stopping

SUPPORTED_NEMO_RUN = "0.11."
"""Prefix of the versions whose treatment of scripts, states and dependencies this was written for."""


@dataclass(frozen=True)
class Launched:
    """What became of a step.

    Attributes:
        name: the step's.
        state: ``done``, ``done before``, ``failed``, ``stopped``, ``not started``, or on Slurm ``submitted``.
        folder: where its logs are.
        job: the job's number on Slurm.
        exit_code: of a failed step, where it is known.
    """

    name: str
    state: str
    folder: Path
    job: str | None = None
    exit_code: int | None = None

    @property
    def well(self) -> bool:
        """Whether nothing is wrong with it."""
        return self.state in ("done", "done before", "submitted")


def dry_run(config: LaunchConfig) -> dict[str, str]:
    """What each step would run, by its name: on Slurm the batch script, elsewhere the task's script.

    Nothing is started, and nothing is left on disk.
    """
    if config.executor != "slurm":
        return {name: step_scripts(config, name)[0].text for name in config.steps}
    with tempfile.TemporaryDirectory() as folder, _experiment(config, Path(folder), "dry") as experiment:
        for name in config.steps:
            _add(experiment, config, name, list(config.steps))
        experiment.dryrun(log=False, delete_exp_dir=False)
        written = Path(experiment._exp_dir)
        texts = {name: (written / f"{name}_sbatch.sh").read_text() for name in config.steps}
        return {name: text.replace(folder, str(config.state.absolute())) for name, text in texts.items()}


def launch(config: LaunchConfig) -> list[Launched]:
    """Run the steps in their order; on Slurm, submit them with their dependencies.

    Blocks until all have ended, but not on Slurm; told to stop meanwhile (SIGINT, SIGTERM, SIGHUP), it tells
    the step that runs, and waits until that has saved. Steps that are done already are left out.

    Raises:
        ValueError: the executor cannot be had here, jobs of an earlier launch are still there, or what was
            submitted was refused.
    """
    _check_executor(config)
    config.state.mkdir(parents=True, exist_ok=True)
    if config.executor == "slurm":
        check_no_live_jobs(config)
    todo = [name for name in config.steps if not is_done(config, name)]
    for name in todo:
        done_file(config, name).unlink(missing_ok=True)
        shutil.rmtree(outcome_folder(config, name), ignore_errors=True)
        outcome_folder(config, name).mkdir()
    number = f"{config.name}_{time.time_ns()}"
    with (
        contextlib.nullcontext() if config.executor == "slurm" else stopping(number),
        _experiment(config, config.state.absolute(), number) as experiment,
    ):
        for name in todo:
            _add(experiment, config, name, todo)
        if todo:
            _run(experiment, config)
        jobs = {job.id: job for job in experiment.jobs}
    # Jobs that wait for nothing have ended only now.
    return [_launched(config, name, jobs.get(name)) for name in config.steps]


def forget(config: LaunchConfig, steps: list[str]) -> None:
    """Forget that steps are done, and those that need them, so that they are done again.

    Raises:
        ValueError: no such step.
    """
    for name in steps:
        if name not in config.steps:
            raise ValueError(f"--again {name}: no such step; there are {', '.join(config.steps)}")
    again = set(steps)
    for name, step in config.steps.items():  # those that are needed come first
        if name in again or again & set(step.after):
            again.add(name)
            done_file(config, name).unlink(missing_ok=True)


def _run(experiment: Any, config: LaunchConfig) -> None:
    from invoke.exceptions import UnexpectedExit

    if config.executor != "slurm":
        experiment.run(tail_logs=True)
        return
    try:
        experiment.run(detach=True)
    except UnexpectedExit as error:  # of sbatch
        cancel([number for job in experiment.jobs if (number := _job_number(job))])
        said = " / ".join(line.strip() for line in error.result.stderr.splitlines() if line.strip())
        command, *_, script = error.result.command.split()
        raise ValueError(
            f"{command} refused {Path(script).name}, and nothing is submitted: {said}"
        ) from error
    for job in experiment.jobs:
        remember(config, job.id, _job_number(job) or "")


def _job_number(job: Any) -> str | None:
    """Of a job that Slurm has taken."""
    handles = job.handles if hasattr(job, "handles") else [job.handle]
    return str(handles[0].partition("://")[2].split("/")[1]) if handles and handles[0] else None


def _launched(config: LaunchConfig, name: str, job: Any) -> Launched:
    if job is None:
        return Launched(name, "done before", config.state)
    executors = job.executors if hasattr(job, "executors") else job.executor
    folder = Path((executors[0] if isinstance(executors, list) else executors).job_dir)
    if config.executor == "slurm":
        return Launched(name, "submitted", folder, job=_job_number(job))
    if is_done(config, name):
        return Launched(name, "done", folder)
    failed = outcome_folder(config, name) / "failed"
    if failed.is_file():
        return Launched(name, "failed", folder, exit_code=int(failed.read_text() or 1))
    started = all(is_done(config, each) for each in config.steps[name].after)
    return Launched(name, "stopped" if started else "not started", folder)


def _check_executor(config: LaunchConfig) -> None:
    if not (config.home / "slurm" / "launched.sh").is_file():
        raise ValueError(f"home={config.home} is no checkout of megatron_klong; name one")
    if config.executor == "slurm" and shutil.which("sbatch") is None:
        raise ValueError("executor=slurm: no sbatch here; launch from a node that submits jobs")
    klong = (config.home / config.venv).absolute() / "bin" / "klong"
    if not config.contained and not klong.is_file():
        raise ValueError(f"venv={config.venv}: no {klong}; run make install there, or name another")
    if config.executor == "docker":
        docker: Any = importlib.import_module("docker")  # nemo-run brings it
        try:
            docker.from_env().ping()
        except docker.errors.DockerException as error:
            raise ValueError(f"executor=docker: no Docker engine answers here ({error})") from error


@contextlib.contextmanager
def _experiment(config: LaunchConfig, folder: Path, number: str) -> Iterator[Any]:
    # Read when nemo_run is imported.
    os.environ["NEMORUN_HOME"] = str(folder)
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
        id=number,
        base_dir=str(folder),
        log_level="ERROR",
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    ) as experiment:
        yield experiment


def _add(experiment: Any, config: LaunchConfig, name: str, among: list[str]) -> None:
    """Add a step; of the steps it waits for, those that are done already are no jobs."""
    import nemo_run

    scripts = step_scripts(config, name)
    executors = [executor(config, name, script.nodes) for script in scripts]
    tasks = [nemo_run.Script(inline=script.text) for script in scripts]
    after = [each for each in config.steps[name].after if each in among]
    if len(tasks) == 1:
        experiment.add(tasks[0], executor=executors[0], name=name, dependencies=after)
    else:
        executors[0].heterogeneous = True
        experiment.add(tasks, executor=executors, name=name, dependencies=after)
