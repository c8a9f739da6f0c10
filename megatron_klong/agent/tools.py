"""The tools of a research agent, as the model sees them and as they run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_klong.sandbox.base import Sandbox
from megatron_klong.trajectory.schema import Json, ToolCall


@dataclass(frozen=True)
class Workplace:
    """What tools act on.

    Attributes:
        sandbox: where commands run.
        sections: the paper, by name of section.
        seconds: the most that one call may take.
    """

    sandbox: Sandbox
    sections: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Observation:
    """What a call came to: the text that the model reads, and whether the work is handed in."""

    text: str
    submitted: bool = False


@dataclass(frozen=True)
class Tool:
    """A tool.

    Attributes:
        parameters: names and descriptions; all are strings, and all are required.
    """

    name: str
    description: str
    parameters: Mapping[str, str]
    call: Callable[[Workplace, Mapping[str, str]], Awaitable[Observation]]

    def describe(self) -> Json:
        """The description in OpenAI's form, which chat formats print."""
        properties = {key: {"type": "string", "description": text} for key, text in self.parameters.items()}
        schema = {"type": "object", "properties": properties, "required": list(self.parameters)}
        function = {"name": self.name, "description": self.description, "parameters": schema}
        return {"type": "function", "function": function}


async def _bash(place: Workplace, arguments: Mapping[str, str]) -> Observation:
    result = await place.sandbox.run(arguments["command"], place.seconds)
    text = result.output.removesuffix("\n")
    if result.exit_code is None:
        return Observation(f"{text}\n[ended after {result.seconds:.0f} s, its time limit]".lstrip("\n"))
    if result.exit_code:
        return Observation(f"{text}\n[exit code {result.exit_code}]".lstrip("\n"))
    return Observation(text)


async def _read_paper(place: Workplace, arguments: Mapping[str, str]) -> Observation:
    section = place.sections.get(arguments["section"].strip())
    return Observation(
        section if section is not None else f"No such section; there are: {', '.join(place.sections)}."
    )


async def _write_file(place: Workplace, arguments: Mapping[str, str]) -> Observation:
    problem = await place.sandbox.write_file(arguments["path"], arguments["content"].encode())
    return Observation("Written." if problem is None else f"Not written: {problem}.")


async def _submit(_place: Workplace, _arguments: Mapping[str, str]) -> Observation:
    return Observation("Submitted.", submitted=True)


TOOLS: Mapping[str, Tool] = MappingProxyType(
    {
        tool.name: tool
        for tool in (
            Tool("read_paper", "Read a section of the paper.", {"section": "Name of the section."},
                 _read_paper),
            Tool("bash", "Run a command.", {"command": "The command line."}, _bash),
            Tool("write_file", "Write a file.", {"path": "Where.", "content": "What."}, _write_file),
            Tool("submit", "Hand in the work.", {}, _submit),
        )
    }
)  # fmt: skip
"""By name, in the order in which they are described to the model."""


def describe_tools() -> tuple[Json, ...]:
    """The descriptions of all tools."""
    return tuple(tool.describe() for tool in TOOLS.values())


async def use_tool(call: ToolCall, place: Workplace) -> Observation:
    """Carry out a call; one that cannot be is answered, not raised.

    Raises:
        SandboxError: the sandbox failed.
    """
    tool = TOOLS.get(call.name)
    if tool is None:
        return Observation(f"There is no tool {call.name!r}; there are: {', '.join(TOOLS)}.")
    for name in tool.parameters:
        if name not in call.arguments:
            return Observation(f"{call.name}: the argument {name!r} is missing.")
        if not isinstance(call.arguments[name], str):
            return Observation(f"{call.name}: the argument {name!r} must be a string.")
    unknown = [name for name in call.arguments if name not in tool.parameters]
    if unknown:
        return Observation(f"{call.name} has no argument {unknown[0]!r}.")
    return await tool.call(place, call.arguments)
