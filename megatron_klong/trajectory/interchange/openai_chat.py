"""OpenAI chat: ``{"messages": [...], "tools": [...], ...}``, as JSONL, a JSON array, or one document.

Read leniently in what harnesses add (unknown fields go to ``metadata``) and strictly in what training
depends on. Written, it is the form in which imported trajectories are kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire, join_text, parse_arguments
from megatron_klong.trajectory.schema import Json, Message, Role, ToolCall, Trajectory


class _Function(Wire):
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    _parse = field_validator("arguments", mode="before")(parse_arguments)


class OpenAICall(Wire):
    """A call as OpenAI's interface has it."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class OpenAIMessage(Wire):
    """A message as OpenAI's interface has it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[OpenAICall] | None = None
    tool_call_id: str | None = None
    finish_reason: str | None = None
    context_only: bool = False
    weight: Literal[0, 1] | None = None
    """OpenAI's own fine-tuning format marks an assistant message that is not trained with 0."""

    metadata: dict[str, Any] = {}
    """Holds metadata whose names are fields here; other metadata stand beside the fields."""

    _join = field_validator("content", mode="before")(join_text)


class _Record(Wire):
    messages: list[OpenAIMessage] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None
    task_id: str | int | None = None
    reward: float | None = None
    prefix_messages: int | None = Field(default=None, ge=0)
    metadata: dict[str, Any] = {}


class OpenAIChat:
    """See the module's text."""

    name = "openai"
    describes = "OpenAI chat: messages and tools, JSONL or JSON"

    def claims(self, keys: frozenset[str]) -> bool:
        return "messages" in keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        return _to_draft(_Record.model_validate(value))


def _to_draft(record: _Record) -> Draft:
    return Draft(
        id=None if record.id is None else str(record.id),
        messages=tuple(to_message(message) for message in record.messages),
        tools=tuple(record.tools or ()),
        task_id=None if record.task_id is None else str(record.task_id),
        reward=record.reward,
        prefix_messages=record.prefix_messages,
        metadata={**record.metadata, **record.unknown},
    )


def to_message(message: OpenAIMessage) -> Message:
    """A message as the schema has it."""
    metadata = message.unknown | message.metadata
    role: Role = "system" if message.role == "developer" else message.role
    if message.role == "developer":
        metadata["source_role"] = "developer"
    if message.finish_reason not in (None, "length"):
        metadata["finish_reason"] = message.finish_reason
    return Message(
        role=role,
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=tuple(to_call(call) for call in message.tool_calls or ()),
        tool_call_id=message.tool_call_id,
        context_only=message.context_only or message.weight == 0,
        cut=message.finish_reason == "length",
        metadata=metadata,
    )


def to_call(call: OpenAICall) -> ToolCall:
    """A call as the schema has it."""
    function = call.function.unknown
    return ToolCall(
        name=call.function.name,
        arguments=call.function.arguments,
        id=call.id,
        metadata=call.unknown | ({"function": function} if function else {}),
    )


def write_openai_chat(trajectory: Trajectory) -> str:
    """One JSONL line without the line feed; :class:`OpenAIChat` reads it back as an equal record."""
    record: Json = {"id": trajectory.id}
    optional = {
        "task_id": trajectory.task_id,
        "reward": trajectory.reward,
        "prefix_messages": trajectory.prefix_messages,
        "tools": list(trajectory.tools) or None,
        "metadata": trajectory.metadata or None,
    }
    record |= {name: value for name, value in optional.items() if value is not None}
    record["messages"] = [_from_message(message) for message in trajectory.messages]
    return json.dumps(record, ensure_ascii=False, allow_nan=False)


def _from_message(message: Message) -> Json:
    calls = [
        {
            **call.metadata,
            **({} if call.id is None else {"id": call.id}),
            "type": "function",
            "function": {
                **call.metadata.get("function", {}),
                "name": call.name,
                "arguments": json.dumps(call.arguments, ensure_ascii=False, allow_nan=False),
            },
        }
        for call in message.tool_calls
    ]
    optional: Json = {
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "context_only": message.context_only or None,
        "finish_reason": "length" if message.cut else None,
    }
    metadata = dict(message.metadata)
    developer = message.role == "system" and metadata.get("source_role") == "developer"
    role = metadata.pop("source_role") if developer else message.role
    if not message.cut and metadata.get("finish_reason") not in (None, "length"):
        optional["finish_reason"] = metadata.pop("finish_reason")
    clashing = {name: metadata.pop(name) for name in OpenAIMessage.model_fields if name in metadata}
    optional["metadata"] = clashing or None
    return {
        "role": role,
        "content": message.content,
        **{name: value for name, value in optional.items() if value is not None},
        **metadata,
    }
