"""OpenAI chat JSONL: one record a line, ``{"messages": [...], "tools": [...], ...}``.

Read leniently in what harnesses add (unknown fields go to ``metadata``) and strictly in what
training depends on: a record that is not a valid conversation is refused with file, line, field
and reason, and the rest goes on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from megatron_klong.trajectory.schema import Json, Message, Role, ToolCall, Trajectory


@dataclass(frozen=True)
class Refusal:
    """A record that was not read.

    Attributes:
        file: where it stands.
        line: 1-based line number.
        field: dotted path inside the record, ``""`` for the record itself.
        reason: what is wrong with it.
        raw: the line as it was, undecodable bytes escaped.
    """

    file: str
    line: int
    field: str
    reason: str
    raw: str

    def __str__(self) -> str:
        where = f"{self.file}:{self.line}"
        return f"{where}: {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"


class _Wire(BaseModel):
    """A null is the same as a field that is absent, as exports of tables write it."""

    model_config = ConfigDict(extra="allow", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        known = cls.model_fields
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in known}

    @property
    def unknown(self) -> Json:
        return dict(self.model_extra or {})


class _Function(_Wire):
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    @field_validator("arguments", mode="before")
    @classmethod
    def _parse(cls, value: Any) -> Any:
        if value is None or value == "":
            return {}
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"not JSON: {error}") from error
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


class _Call(_Wire):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _Function


class _Message(_Wire):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None
    tool_call_id: str | None = None
    finish_reason: str | None = None
    context_only: bool = False
    weight: Literal[0, 1] | None = None
    """OpenAI's own fine-tuning format marks an assistant message that is not trained with 0."""

    @field_validator("content", mode="before")
    @classmethod
    def _join_text_parts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        texts = [part if isinstance(part, str) else _text_part(part) for part in value]
        return "".join(texts)


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise ValueError(f"content part of type {kind!r}; only text is supported")


class _Record(_Wire):
    messages: list[_Message] = Field(min_length=1)
    tools: list[dict[str, Any]] | None = None
    id: str | int | None = None
    task_id: str | int | None = None
    reward: float | None = None
    prefix_messages: int | None = Field(default=None, ge=0)
    metadata: dict[str, Any] = {}

    @model_validator(mode="after")
    def _is_a_conversation(self) -> _Record:
        if not any(message.role == "assistant" for message in self.messages):
            raise ValueError("messages: no assistant message")
        open_calls: set[str] = set()
        for index, message in enumerate(self.messages):
            where = f"messages.{index}"
            if message.role == "assistant":
                if not (message.content or message.reasoning_content or message.tool_calls):
                    raise ValueError(f"{where}: an assistant message without content, reasoning or calls")
                open_calls = _call_ids(message, where)
            elif message.tool_calls:
                raise ValueError(f"{where}.tool_calls: only an assistant message may call tools")
            if message.role == "tool" and message.tool_call_id not in open_calls:
                raise ValueError(
                    f"{where}.tool_call_id: {message.tool_call_id!r} answers no call of the "
                    "assistant message before it"
                )
        self._mark_ends_a_block()
        return self

    def _mark_ends_a_block(self) -> None:
        """The prefix rule `marked` pins whole blocks: the initial messages and whole turns."""
        mark, count = self.prefix_messages, len(self.messages)
        if mark is None or mark == count or (mark < count and self.messages[mark].role == "assistant"):
            return
        raise ValueError(
            f"prefix_messages: {mark} must end the initial messages or a whole turn: the message "
            f"after it is to be an assistant's, or it is all {count}"
        )


def _call_ids(message: _Message, where: str) -> set[str]:
    """The ids of a message's calls; a lone call may have none, and its result then neither."""
    ids = [call.id for call in message.tool_calls or []]
    for index, call_id in enumerate(ids):
        if call_id in ids[:index]:
            raise ValueError(f"{where}.tool_calls.{index}.id: {call_id!r} is used twice")
    return set(ids)  # type: ignore[arg-type]


def read_openai_chat(
    file: Path, name: str | None = None, seen: set[str] | None = None
) -> Iterator[Trajectory | Refusal]:
    """Stream the records of a JSONL file; blank lines are passed over.

    A record without an ``id`` gets ``NAME-LINE``; the name is the file's stem unless given. A record
    whose id is in ``seen`` (ids of earlier records, added to as the file is read) is refused.
    """
    name = file.stem if name is None else name
    seen = set() if seen is None else seen
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield _read_line(line, file, number, f"{name}-{number}", seen)


def _read_line(line: bytes, file: Path, number: int, default_id: str, seen: set[str]) -> Trajectory | Refusal:
    def refuse(field: str, reason: str) -> Refusal:
        raw = line.decode("utf-8", "backslashreplace").rstrip("\n")
        return Refusal(str(file), number, field, reason, raw)

    try:
        record = _Record.model_validate(_parse_json(line))
    except UnicodeDecodeError as error:
        return refuse("", f"not UTF-8 at byte {error.start}")
    except UnicodeEncodeError:
        return refuse("", "has half of a surrogate pair, which is no text")
    except json.JSONDecodeError as error:
        return refuse("", f"not JSON: {error}")
    except RecursionError:
        return refuse("", "nested too deeply")
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        if not field and ": " in reason:
            field, reason = reason.split(": ", 1)
        return refuse(field, reason)
    trajectory = _to_trajectory(record, default_id)
    try:
        write_openai_chat(trajectory).encode()
    except ValueError:
        return refuse("", "has half of a surrogate pair or a number that JSON cannot hold")
    if trajectory.id in seen:
        return refuse("id", f"{trajectory.id!r} was used by an earlier record")
    seen.add(trajectory.id)
    return trajectory


def _parse_json(line: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark; NaN and infinities are no JSON."""

    def refuse(name: str) -> float:
        raise json.JSONDecodeError(f"{name} is not a JSON value", name, 0)

    try:
        return json.loads(line.decode("utf-8-sig"), parse_constant=refuse)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise json.JSONDecodeError(str(error), "", 0) from error


def _to_trajectory(record: _Record, default_id: str) -> Trajectory:
    return Trajectory(
        id=default_id if record.id is None else str(record.id),
        messages=tuple(_to_message(message) for message in record.messages),
        tools=tuple(record.tools or ()),
        task_id=None if record.task_id is None else str(record.task_id),
        reward=record.reward,
        prefix_messages=record.prefix_messages,
        metadata={**record.metadata, **record.unknown},
    )


def _to_message(message: _Message) -> Message:
    metadata = message.unknown
    role: Role = "system" if message.role == "developer" else message.role
    if message.role == "developer":
        metadata["source_role"] = "developer"
    if message.finish_reason not in (None, "length"):
        metadata["finish_reason"] = message.finish_reason
    return Message(
        role=role,
        content=message.content,
        reasoning_content=message.reasoning_content,
        tool_calls=tuple(
            ToolCall(
                name=call.function.name,
                arguments=call.function.arguments,
                id=call.id,
                metadata=call.unknown
                | ({"function": call.function.unknown} if call.function.unknown else {}),
            )
            for call in message.tool_calls or ()
        ),
        tool_call_id=message.tool_call_id,
        context_only=message.context_only or message.weight == 0,
        cut=message.finish_reason == "length",
        metadata=metadata,
    )


def write_openai_chat(trajectory: Trajectory) -> str:
    """One JSONL line without the line feed; :func:`read_openai_chat` gives an equal record back."""
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
    optional = {
        "reasoning_content": message.reasoning_content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id,
        "context_only": message.context_only or None,
        "finish_reason": "length" if message.cut else None,
    }
    metadata = dict(message.metadata)
    developer = message.role == "system" and metadata.get("source_role") == "developer"
    role = metadata.pop("source_role") if developer else message.role
    return {
        "role": role,
        "content": message.content,
        **{name: value for name, value in optional.items() if value is not None},
        **metadata,
    }
