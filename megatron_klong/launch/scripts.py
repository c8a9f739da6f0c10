"""The scripts that the tasks of a step run; the same on every executor, as far as it can be.

A step is done when ``STATE/STEP.done`` has its digest: of its command and of those it needs, so that a step
is not done any more when one before it has changed. What its tasks say of their end is in a folder of its own
for each attempt: ``failed``, the exit code of the first that failed by itself, and ``ended-ROLE-TASK``, how
the roles of reinforcement learning ended.
"""

from __future__ import annotations

import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.config import LaunchConfig, NodesConfig, StepConfig

STOPPED = 143
"""How ``klong`` ends after SIGTERM, with a checkpoint."""


@dataclass(frozen=True)
class TaskScript:
    """What one kind of a step's tasks runs.

    Attributes:
        text: bash.
        nodes: what they take on Slurm.
    """

    text: str
    nodes: NodesConfig


def digest(config: LaunchConfig, name: str) -> str:
    """Of a step's command and, with theirs, of the steps it needs."""
    parts = [command_line(config.steps[name]), *(digest(config, each) for each in config.steps[name].after)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def done_file(config: LaunchConfig, name: str) -> Path:
    """The file that has a step's digest since it is done."""
    return config.state.absolute() / f"{name}.done"


def outcome_folder(config: LaunchConfig, name: str) -> Path:
    """Where tasks say how they ended; on Slurm each attempt of a job has another."""
    return config.state.absolute() / f"{name}.outcome"


def is_done(config: LaunchConfig, name: str) -> bool:
    """Whether a step is done, with the commands that it and those before it have now."""
    file = done_file(config, name)
    return file.is_file() and file.read_text().strip() == digest(config, name)


def command_line(step: StepConfig) -> str:
    """The command of a step, as a shell would read it."""
    return shlex.join(("klong", *step.run))


def step_scripts(config: LaunchConfig, name: str) -> list[TaskScript]:
    """A script for all tasks of a step; with roles on Slurm, one for each role."""
    step = config.steps[name]
    if step.roles is None or config.executor != "slurm":
        return [TaskScript(_script(config, name, shlex.join(step.run), ""), step.nodes)]
    _, file, *overrides = step.run
    servers = step.roles.server.count * step.roles.server.tasks
    given = shlex.join((file, *overrides, f"servers={servers}"))
    of_server = (
        ' "server.host=${KLONG_SERVER_HOST:-0.0.0.0}"'
        ' "server.address=${KLONG_SERVER_ADDRESS:-$SLURMD_NODENAME}" --number "$SLURM_PROCID"'
    )
    tasks = sum(nodes.count * nodes.tasks for _, nodes in step.roles)
    return [
        TaskScript(
            _script(
                config, name, f"rl {role} {given}" + (of_server if role == "server" else ""),
                _wait_for_others(role, tasks),
            ),
            nodes,
        )
        for role, nodes in step.roles
    ]  # fmt: skip


def _script(config: LaunchConfig, name: str, arguments: str, at_end: str) -> str:
    """Run ``klong ARGUMENTS`` (quoted for the shell) if what it needs is done, and say how it ended."""
    state, home = shlex.quote(str(config.state.absolute())), shlex.quote(str(config.home.absolute()))
    needed = "".join(
        f'[[ "$(cat {state}/{each}.done 2>/dev/null)" == {digest(config, each)} ]] || {{\n'
        f'    echo "error: {name} needs {each}, which is not done; its log says why" >&2\n    exit 3\n}}\n'
        for each in config.steps[name].after
    )
    done = f'[[ "$status" != 0 ]] || echo {digest(config, name)} >{state}/{name}.done\n'
    if config.executor == "slurm":
        done = ""  # the batch script says so, when all tasks have ended
    return f"""\
# Step {name} of {config.name}
set -uo pipefail
outcome="${{KLONG_OUTCOME:-{state}/{name}.outcome}}"
# The command is told to stop as well; this script waits for it, and knows that it was.
told=""
trap 'told=yes' TERM INT
cd {home} || exit 3
{needed}status=0
{_klong(config)} {arguments} || status=$?
# Of ranks that are told to stop some lose sight of others before their own turn: they were stopped, too.
[[ -z "$told" || "$status" == 0 || "$status" == 2 ]] || status={STOPPED}
if [[ "$status" != 0 && "$status" != {STOPPED} ]]; then
    # The first to fail is the cause; the others follow from it.
    (set -o noclobber && echo "$status" >"$outcome/failed") 2>/dev/null || true
    exit "$status"
fi
{at_end}{done}exit "$status"
"""


def _wait_for_others(role: str, tasks: int) -> str:
    """A role that is done, or has stopped, waits for the others: nemo-run ends all soon after the first."""
    return f"""\
echo "$status" >"$outcome/ended-{role}-$SLURM_PROCID"
until (($(find "$outcome" -name 'ended-*' | wc -l) >= {tasks})); do sleep 1; done
"""


def batch_setup(config: LaunchConfig, name: str) -> str:
    """What a step's batch script does on Slurm before its tasks: see slurm/launched.sh."""
    assert config.slurm is not None
    home, state, step = config.home.absolute(), config.state.absolute(), config.steps[name]
    values = {
        "KLONG_HOME": str(home), "KLONG_STATE": str(state), "KLONG_LOGS": str(state / "logs"),
        "KLONG_STEP": name, "KLONG_DIGEST": digest(config, name),
        "KLONG_REQUEUES": str(config.slurm.requeues if step.resumes else 0),
        "KLONG_CONTAINER": "pyxis" if config.slurm.image else "none",
        **config.slurm.environment,
    }  # fmt: skip
    exports = [f"export {key}={shlex.quote(value)}" for key, value in values.items()]
    return "\n".join(["", "set +vx", *exports, 'source "$KLONG_HOME/slurm/launched.sh"', ""])


def _klong(config: LaunchConfig) -> str:
    if config.contained:
        return "klong"
    return shlex.quote(str((config.home / config.venv).absolute() / "bin" / "klong"))
