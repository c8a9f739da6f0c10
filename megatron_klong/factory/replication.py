"""A generated domain: replicate a tiny paper through tools.

A task is a paper whose method section gives a key digit, and a number of experiments. The agent
reads the method once, then runs every experiment (two digits come back) and writes a result file:
the two digits, and the first of them plus the key, modulo ten. The key stands only in the first
turn, so a model that has lost its prefix cannot do the task; everything else is in the last turns.
A rubric in PaperBench's format gives one leaf to every experiment.

The expert is scripted, acts through the same tools as an agent and sees only what they return.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_klong.trajectory.schema import Json, Message, ToolCall, Trajectory

SYSTEM_PROMPT = "You replicate papers with your tools."


def _tool(name: str, description: str, **parameters: str) -> Json:
    properties = {key: {"type": "string", "description": text} for key, text in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": name, "description": description, "parameters": schema}
    return {"type": "function", "function": function}


TOOLS: tuple[Json, ...] = (
    _tool("read_paper", "Read a section of the paper.", section="Name of the section."),
    _tool("bash", "Run a command.", command="The command line."),
    _tool("write_file", "Write a file.", path="Where.", content="What."),
    _tool("submit", "Hand in the work."),
)


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
        return (
            "The result of an experiment is its measurement, followed by the first digit of the "
            f"measurement plus {self.key}, modulo ten."
        )

    @property
    def paper(self) -> str:
        """The whole paper as Markdown."""
        return f"# {self.id}\n\n## method\n\n{self.method}\n"

    def result(self, experiment: int) -> str:
        """The right content of an experiment's file; experiments count from 1."""
        measured = self.measurements[experiment - 1]
        return f"{measured}{(int(measured[0]) + self.key) % 10}"

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


@dataclass
class ReplicationEnvironment:
    """The tools of a task, in process: what the scripted expert acts through."""

    task: ReplicationTask
    files: dict[str, str] = field(default_factory=dict)
    submitted: bool = False

    def call(self, name: str, arguments: dict[str, Any]) -> str:
        """Run a tool and return what the agent observes; a wrong call is answered, not raised."""
        if name == "read_paper":
            return self.task.method if arguments.get("section") == "method" else "No such section."
        if name == "bash":
            return self._run(str(arguments.get("command", "")))
        if name == "write_file" and {"path", "content"} <= arguments.keys():
            self.files[str(arguments["path"])] = str(arguments["content"])
            return "Written."
        if name == "submit":
            self.submitted = True
            return "Submitted."
        return "No such tool, or arguments are missing."

    def _run(self, command: str) -> str:
        program, _, name = command.partition(" ")
        if program != "run" or name not in self.task.experiment_names():
            return "No such command."
        return self.task.measurements[int(name) - 1]

    def grade(self) -> float:
        """Share of experiments whose file holds the right result, in [0, 1]."""
        names = self.task.experiment_names()
        right = [self.files.get(name) == self.task.result(int(name)) for name in names]
        return sum(right) / len(right)


def generate_tasks(
    count: int, seed: int, *, min_experiments: int = 30, max_experiments: int = 50
) -> Iterator[ReplicationTask]:
    """Tasks drawn from a seed, all of them different streams of one generator.

    Raises:
        ValueError: experiments must be numbered with two digits.
    """
    if not 1 <= min_experiments <= max_experiments <= 99:
        raise ValueError(
            f"experiments: from {min_experiments} to {max_experiments} is no range within 1 to 99"
        )
    for number in range(count):
        draw = random.Random(f"{seed}/{number}")
        experiments = draw.randint(min_experiments, max_experiments)
        yield ReplicationTask(
            id=f"replication-{seed}-{number:05d}",
            key=draw.randrange(10),
            measurements=tuple(f"{draw.randrange(100):02d}" for _ in range(experiments)),
        )


def expert_trajectory(task: ReplicationTask) -> Trajectory:
    """Let the scripted expert work on a task and grade what it did."""
    environment = ReplicationEnvironment(task)
    messages = [Message("system", SYSTEM_PROMPT), Message("user", task.prompt)]
    while not environment.submitted:
        call = _next_call(messages)
        call_id = f"call-{len(messages)}"
        call = ToolCall(call.name, call.arguments, call_id)
        messages.append(Message("assistant", tool_calls=(call,)))
        observation = environment.call(call.name, call.arguments)
        messages.append(Message("tool", observation, tool_call_id=call_id))
    return Trajectory(
        id=task.id,
        task_id=task.id,
        messages=tuple(messages),
        tools=TOOLS,
        reward=environment.grade(),
    )


def _next_call(messages: list[Message]) -> ToolCall:
    """The expert's policy: a function of the conversation so far."""
    if len(messages) == 2:
        return ToolCall("read_paper", {"section": "method"})
    (last,) = messages[-2].tool_calls
    observed = messages[-1].content or ""
    if last.name == "bash":
        key = next(letter for letter in (messages[3].content or "") if letter.isdigit())
        result = f"{observed}{(int(observed[0]) + int(key)) % 10}"
        return ToolCall("write_file", {"path": last.arguments["command"].split()[1], "content": result})
    done = int(last.arguments["path"]) if last.name == "write_file" else 0
    total = int("".join(letter for letter in messages[1].content or "" if letter.isdigit()))
    return ToolCall("bash", {"command": f"run {done + 1:02d}"}) if done < total else ToolCall("submit", {})
