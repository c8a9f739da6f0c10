"""mini-swe-agent ``.traj.json``, formats ``mini-swe-agent-1`` and ``-1.1``: one run a file.

The run ends in a message of role ``exit``, which no model sees: it becomes the result of the call that ended
the run, or a user's message where the harness made no calls, and keeps its role in ``metadata.source_role``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.openai_chat import OpenAIMessage, to_message
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire
from megatron_klong.trajectory.schema import Message

_EXIT = "exit"


class _Record(Wire):
    messages: list[dict[str, Any]] = Field(min_length=1)
    instance_id: str | None = None
    info: dict[str, Any] = {}


class _Messages(Wire):
    messages: list[OpenAIMessage]


class MiniSweAgent:
    """See the module's text."""

    name = "mini-swe-agent"
    describes = "mini-swe-agent .traj.json"

    def claims(self, keys: frozenset[str]) -> bool:
        old = {"info", "messages"} <= keys and not keys & {"id", "reward", "task_id", "tools"}
        return {"trajectory_format", "messages"} <= keys or old

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        record = _Record.model_validate(value)
        exits = [number for number, raw in enumerate(record.messages) if raw.get("role") == _EXIT]
        raw = [{**each, "role": "user"} if each.get("role") == _EXIT else each for each in record.messages]
        read = _Messages.model_validate({"messages": raw}).messages
        messages = [to_message(message) for message in read]
        for number in exits:
            messages[number] = _ended(messages, number)
        return Draft(
            tuple(messages),
            task_id=record.instance_id,
            metadata={**record.unknown, "info": record.info},
        )


def _ended(messages: list[Message], number: int) -> Message:
    """The message of role ``exit``: the answer to a call that has none, or what a user says."""
    message = messages[number]
    message = replace(message, metadata={**message.metadata, "source_role": _EXIT})
    last = next((n for n in range(number - 1, -1, -1) if messages[n].role == "assistant"), None)
    if last is None:
        return message
    answered = {each.tool_call_id for each in messages[last + 1 : number] if each.role == "tool"}
    waiting = [call.id for call in messages[last].tool_calls if call.id not in answered]
    return replace(message, role="tool", tool_call_id=waiting[0]) if waiting else message
