"""ShareGPT: ``{"conversations": [{"from": "human", "value": ...}, ...]}``, with the calls of LLaMA-Factory.

``function_call`` is an assistant's message whose value is JSON, a call or a list of calls; ``observation``
answers them in their order. ``system`` and ``tools`` (JSON in a string) may stand beside the conversation.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import AliasChoices, Field, field_validator

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire, join_text, parse_arguments
from megatron_klong.trajectory.schema import Message, Role, ToolCall

_ROLES: Mapping[str, Role] = MappingProxyType(
    {
        "system": "system", "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
        "bing": "assistant", "bard": "assistant", "model": "assistant", "assistant": "assistant",
        "function_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    }
)  # fmt: skip


class _Call(Wire):
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    _parse = field_validator("arguments", mode="before")(parse_arguments)


class _Said(Wire):
    speaker: str = Field(validation_alias=AliasChoices("from", "role"))
    value: str = Field(validation_alias=AliasChoices("value", "content"))
    weight: float | None = None
    train: bool = True

    _join = field_validator("value", mode="before")(join_text)


class _Record(Wire):
    conversations: list[_Said] = Field(min_length=1)
    system: str | None = None
    tools: list[dict[str, Any]] = []
    id: str | int | None = None

    @field_validator("tools", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return json.loads(value) if value.strip() else []
        except (ValueError, RecursionError) as error:
            raise FieldError("", f"not JSON: {error}") from error


class ShareGpt:
    """See the module's text."""

    name = "sharegpt"
    describes = "ShareGPT: conversations of from and value, with LLaMA-Factory's calls; JSONL or JSON"

    def claims(self, keys: frozenset[str]) -> bool:
        return "conversations" in keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        record = _Record.model_validate(value)
        messages = [Message("system", record.system)] if record.system else []
        origins = ["system"] if record.system else []
        waiting: list[ToolCall] = []
        for number, said in enumerate(record.conversations):
            origin = f"conversations.{number}"
            message = _message(said, origin)
            if message.role == "assistant":
                waiting = list(message.tool_calls)
            elif message.role == "tool":
                if not waiting:
                    raise FieldError(f"{origin}.from", f"{said.speaker!r} answers no call before it")
                message = replace(message, tool_call_id=waiting.pop(0).id)
            messages.append(message)
            origins.append(origin)
        return Draft(
            tuple(messages), id=None if record.id is None else str(record.id), tools=tuple(record.tools),
            metadata=record.unknown, origins=tuple(origins),
        )  # fmt: skip


def _message(said: _Said, origin: str) -> Message:
    role = _ROLES.get(said.speaker)
    if role is None:
        raise FieldError(f"{origin}.from", f"{said.speaker!r} is unknown; known are {', '.join(_ROLES)}")
    metadata = said.unknown
    if said.weight not in (None, 0, 1):
        metadata["weight"] = said.weight
    context_only = said.weight == 0 or not said.train
    if said.speaker != "function_call":
        return Message(role, said.value, context_only=context_only, metadata=metadata)
    return Message(role, tool_calls=_calls(said.value, origin), context_only=context_only, metadata=metadata)


def _calls(text: str, origin: str) -> tuple[ToolCall, ...]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{origin}.value", f"a function_call that is no JSON: {error}") from error
    found = [_Call.model_validate(each) for each in (value if isinstance(value, list) else [value])]
    return tuple(
        ToolCall(call.name, call.arguments, f"{origin}.{number}", call.unknown)
        for number, call in enumerate(found)
    )
