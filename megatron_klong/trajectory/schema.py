"""The records that every reader produces and everything downstream takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
Json = dict[str, Any]


@dataclass(frozen=True)
class ToolCall:
    """One call of an assistant message; ``arguments`` is the parsed JSON object."""

    name: str
    arguments: Json
    id: str | None = None
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Message:
    """A chat message, OpenAI style.

    Attributes:
        content: the text; None where the message had none.
        reasoning_content: the reasoning, where the format keeps it apart.
        context_only: seen by the model but never trained (a copied or demonstration message).
        cut: the action ended at the length limit (``finish_reason`` ``length``) and so has no
            stop id.
        metadata: fields of the source that have no place here.
    """

    role: Role
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    context_only: bool = False
    cut: bool = False
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Trajectory:
    """A whole conversation of an agent with its environment.

    Attributes:
        prefix_messages: for the prefix rule ``marked``: how many messages, from the first, stay in
            every window.
    """

    id: str
    messages: tuple[Message, ...]
    tools: tuple[Json, ...] = ()
    task_id: str | None = None
    reward: float | None = None
    prefix_messages: int | None = None
    metadata: Json = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One assistant message and everything that answers it until the next one."""

    action: Message
    answer: tuple[Message, ...]


def initial_messages(messages: Sequence[Message]) -> tuple[Message, ...]:
    """The messages before the first action."""
    for index, message in enumerate(messages):
        if message.role == "assistant":
            return tuple(messages[:index])
    return tuple(messages)


def turns(messages: Sequence[Message]) -> tuple[Turn, ...]:
    """The turns after the initial messages, in order."""
    starts = [index for index, message in enumerate(messages) if message.role == "assistant"]
    stops = [*starts[1:], len(messages)]
    return tuple(
        Turn(messages[start], tuple(messages[start + 1 : stop]))
        for start, stop in zip(starts, stops, strict=False)
    )
