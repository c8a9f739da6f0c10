"""A generated domain: replicate a tiny paper through tools.

A task is a paper whose method section gives a key digit, and a number of experiments. The agent
reads the method once, then runs every experiment (two digits come back) and writes a result file:
the two digits, and the key. The paper is read in the first turn only, and stays in the prefix of every
window; everything else is in the last turns. A tiny model learns it in minutes.
A rubric in PaperBench's format gives one leaf to every experiment.

The expert is scripted and sees only what its tools return. It acts in process, for speed; that the same
calls give the same observations in a real sandbox is tested. A *hurried* expert hands in before the last
experiment: demonstrations of middling grade, for a start that reinforcement learning can improve.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_klong.agent.tools import describe_tools
from megatron_klong.trajectory.schema import Json, Message, ToolCall, Trajectory

SYSTEM_PROMPT = "You replicate papers with your tools."


@dataclass(frozen=True)
class ReplicationTask:
    """One paper to replicate.

    Attributes:
        key: the digit that the method section gives.
        measurements: what each experiment measures, two digits.
    """

    id: str
    key: int
    measurements: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """What the user asks."""
        return (
            f"Replicate the paper. It has {len(self.measurements):02d} experiments. Read its method, "
            "run each experiment and write its result to a file of its name, then submit."
        )

    @property
    def method(self) -> str:
        """The method section of the paper."""
        return f"The result of an experiment is its measurement, followed by {self.key}."

    @property
    def paper(self) -> str:
        """The whole paper as Markdown."""
        return f"# {self.id}\n\n## method\n\n{self.method}\n"

    def result(self, experiment: int) -> str:
        """The right content of an experiment's file; experiments count from 1."""
        return f"{self.measurements[experiment - 1]}{self.key}"

    def rubric(self) -> Json:
        """The grading tree in PaperBench's format: one leaf per experiment, equal weights."""
        leaves = [
            _node(
                f"{self.id}/{name}",
                f"File {name} holds {self.result(number)}, the result of experiment {name}.",
                category="Result Analysis",
            )
            for number, name in enumerate(self.experiment_names(), 1)
        ]
        return _node(self.id, "The paper is replicated.", leaves)

    def checks(self) -> Json:
        """How each leaf is graded, by its id: the file must hold the result, and nothing else."""
        return {
            f"{self.id}/{name}": {"command": f'[ "$(<{name})" = {self.result(number)} ]'}
            for number, name in enumerate(self.experiment_names(), 1)
        }

    def measurement_table(self) -> str:
        """What the sandbox's ``run`` program looks experiments up in: name and measurement, line by line."""
        return "".join(f"{name} {value}\n" for name, value in zip(self.experiment_names(), self.measurements))

    def experiment_names(self) -> list[str]:
        """``01``, ``02``, ..."""
        return [f"{number:02d}" for number in range(1, len(self.measurements) + 1)]


def _node(
    name: str, requirements: str, children: list[Json] | None = None, category: str | None = None
) -> Json:
    return {
        "id": name,
        "requirements": requirements,
        "weight": 1,
        "sub_tasks": children or [],
        "task_category": category,
        "finegrained_task_category": None,
    }


RUN_PROGRAM = """#!/bin/sh
# run NAME: carry out an experiment of the paper and print what it measures.
while read -r name value; do
    [ "$name" = "$1" ] && echo "$value" && exit 0
done < /task/measurements
echo "run: there is no experiment '$1'"
exit 1
"""
"""The program in every task's sandbox."""


@dataclass
class ReplicationEnvironment:
    """The tools of a task, in process, as far as the expert uses them."""

    task: ReplicationTask
    files: dict[str, str] = field(default_factory=dict)
    submitted: bool = False

    def call(self, call: ToolCall) -> str:
        """Carry out a call; what is observed is what the real tools say."""
        arguments = call.arguments
        match call.name:
            case "read_paper":
                assert arguments["section"] == "method"
                return self.task.method
            case "bash":
                program, name = arguments["command"].split()
                assert program == "run"
                return self.task.measurements[int(name) - 1]
            case "write_file":
                self.files[arguments["path"]] = arguments["content"]
                return "Written."
            case _:
                assert call.name == "submit"
                self.submitted = True
                return "Submitted."

    def grade(self) -> float:
        """Share of experiments whose file holds the right result, in [0, 1]."""
        names = self.task.experiment_names()
        right = [self.files.get(name) == self.task.result(int(name)) for name in names]
        return sum(right) / len(right)


def generate_tasks(
    count: int, seed: int, experiments: tuple[int, int] = (30, 50)
) -> Iterator[ReplicationTask]:
    """Tasks drawn from a seed, all of them different streams of one generator.

    Args:
        experiments: fewest and most of a task.

    Raises:
        ValueError: experiments must be numbered with two digits.
    """
    fewest, most = experiments
    if not 1 <= fewest <= most <= 99:
        raise ValueError(f"experiments: from {fewest} to {most} is no range within 1 to 99")
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        size = draw.randint(fewest, most)
        yield ReplicationTask(
            id=f"replication-{seed}-{number:05d}",
            key=draw.randrange(10),
            measurements=tuple(f"{draw.randrange(100):02d}" for _ in range(size)),
        )


def experiments_done(task: ReplicationTask, hurried: float) -> int:
    """How many experiments the expert carries out: all, or with probability ``hurried`` fewer."""
    draw = random.Random(f"expert/{task.id}")
    total = len(task.measurements)
    return draw.randrange(1, total) if total > 1 and draw.random() < hurried else total


def expert_trajectory(task: ReplicationTask, experiments: int | None = None) -> Trajectory:
    """Let the scripted expert work on a task and grade what it did.

    Args:
        experiments: hand in after so many; default all.
    """
    environment = ReplicationEnvironment(task)
    done = len(task.measurements) if experiments is None else experiments
    messages = [Message("system", SYSTEM_PROMPT), Message("user", task.prompt)]
    while not environment.submitted:
        call = _next_call(messages, done)
        call_id = f"call-{len(messages)}"
        call = ToolCall(call.name, call.arguments, call_id)
        messages.append(Message("assistant", tool_calls=(call,)))
        messages.append(Message("tool", environment.call(call), tool_call_id=call_id))
    return Trajectory(
        id=task.id,
        task_id=task.id,
        messages=tuple(messages),
        tools=describe_tools(),
        reward=environment.grade(),
    )


def _next_call(messages: list[Message], experiments: int) -> ToolCall:
    """The expert's policy: a function of the conversation so far, and of when it hands in."""
    if len(messages) == 2:
        return ToolCall("read_paper", {"section": "method"})
    (last,) = messages[-2].tool_calls
    observed = messages[-1].content or ""
    if last.name == "bash":
        key = next(letter for letter in (messages[3].content or "") if letter.isdigit())
        name = last.arguments["command"].split()[1]
        return ToolCall("write_file", {"path": name, "content": observed + key})
    done = int(last.arguments["path"]) if last.name == "write_file" else 0
    if done < experiments:
        return ToolCall("bash", {"command": f"run {done + 1:02d}"})
    return ToolCall("submit", {})
