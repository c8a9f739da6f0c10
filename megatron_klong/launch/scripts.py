"""The scripts that the tasks of a step run; the same on every executor, as far as it can be."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.config import LaunchConfig, NodesConfig, RolesConfig, StepConfig


@dataclass(frozen=True)
class TaskScript:
    """What one kind of a step's tasks runs.

    Attributes:
        name: the step's, or step and role.
        text: bash.
        nodes: what they take on Slurm.
    """

    name: str
    text: str
    nodes: NodesConfig


def done_file(config: LaunchConfig, name: str) -> Path:
    """The file that holds a step's command since it is done."""
    return config.state.absolute() / f"{name}.done"


def failed_file(config: LaunchConfig, name: str) -> Path:
    """The file that holds the exit code of a step's last failure."""
    return config.state.absolute() / f"{name}.failed"


def is_done(config: LaunchConfig, name: str) -> bool:
    """Whether a step is done, by the command that it has now."""
    file = done_file(config, name)
    return file.is_file() and file.read_text().strip() == command_line(config.steps[name])


def command_line(step: StepConfig) -> str:
    """The command of a step, as a shell would read it."""
    return shlex.join(("klong", *step.run))


def step_scripts(config: LaunchConfig, name: str) -> list[TaskScript]:
    """A script for all tasks of a step; with roles on Slurm, one for each role."""
    step = config.steps[name]
    if step.roles is None or config.executor != "slurm":
        return [TaskScript(name, _script(config, name, shlex.join(step.run)), step.nodes)]
    _, file, *overrides = step.run
    servers = step.roles.server.count * step.roles.server.tasks
    given = shlex.join((file, *overrides, f"servers={servers}"))
    of_server = (
        ' "server.host=${KLONG_SERVER_HOST:-0.0.0.0}"'
        ' "server.address=${KLONG_SERVER_ADDRESS:-$SLURMD_NODENAME}" --number "$SLURM_PROCID"'
    )
    return [
        TaskScript(
            f"{name}-{role}",
            _script(config, name, f"rl {role} {given}" + (of_server if role == "server" else ""), role),
            nodes,
        )
        for role, nodes in step.roles
    ]


def _script(config: LaunchConfig, name: str, arguments: str, role: str | None = None) -> str:
    """Run ``klong ARGUMENTS`` (quoted for the shell) if what it needs is done, and note how it ended.

    A role that is done, or has stopped, waits for the others: nemo-run ends all soon after the first.
    """
    step, done, failed = config.steps[name], done_file(config, name), failed_file(config, name)
    lines = [
        f"# Step {name} of {config.name}",
        "set -uo pipefail",
        # What is told to stop is the command; this script waits for it.
        "trap : TERM INT",
        f"cd {shlex.quote(str(config.home.absolute()))} || exit 3",
    ]
    for needed in step.after:
        lines += [
            f"[[ -e {shlex.quote(str(done_file(config, needed)))} ]] || {{",
            f'    echo "error: {name} needs {needed}, which is not done; its log says why" >&2',
            "    exit 3",
            "}",
        ]
    command = shlex.quote(command_line(step))
    lines += [
        "status=0",
        f"{_klong(config)} {arguments} || status=$?",
        f'[[ "$status" == 0 || "$status" == 143 ]] || echo "$status" >{shlex.quote(str(failed))}',
    ]
    if role is not None:
        ended = shlex.quote(f"{config.state.absolute() / name}.ended")
        others = " && ".join(f"-e {ended}/{each}" for each in RolesConfig.model_fields)
        lines += [
            '[[ "$status" == 0 || "$status" == 143 ]] || exit "$status"',
            f'[[ "$SLURM_PROCID" != 0 ]] || touch {ended}/{role}',
            f"until [[ {others} ]]; do sleep 1; done",
        ]
    if config.executor != "slurm":  # there the batch script does it, when all tasks have ended
        lines.append(f"""[[ "$status" != 0 ]] || printf '%s\\n' {command} >{shlex.quote(str(done))}""")
    return "\n".join([*lines, 'exit "$status"', ""])


def batch_setup(config: LaunchConfig, name: str) -> str:
    """What a step's batch script does on Slurm before its tasks: see slurm/launched.sh."""
    assert config.slurm is not None
    home, state = config.home.absolute(), config.state.absolute()
    values = {
        "KLONG_HOME": str(home), "KLONG_STATE": str(state), "KLONG_LOGS": str(state / "logs"),
        "KLONG_STEP": name, "KLONG_COMMAND": command_line(config.steps[name]),
        "KLONG_REQUEUES": str(config.slurm.requeues),
    }  # fmt: skip
    exports = [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
    return "\n".join(["", "set +vx", *exports, 'source "$KLONG_HOME/slurm/launched.sh"', ""])


def _klong(config: LaunchConfig) -> str:
    if config.contained:
        return "klong"
    return shlex.quote(str((config.home / config.venv).absolute() / "bin" / "klong"))
