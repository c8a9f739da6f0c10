"""OpenHands V1 events, one JSON object a line (or an array of them): the whole file is one run.

Consecutive ``ActionEvent`` of one ``llm_response_id`` are one assistant's message. An observation whose
action is not in the file, as in a part of a run, is kept as a user's message. Events that no model sees are
kept in ``metadata.events``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from megatron_klong.trajectory.interchange.conversation import Draft, EventConversation
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire, join_text, parse_arguments
from megatron_klong.trajectory.schema import Json, Message, Role, ToolCall

_ERROR = "[An error occurred during execution.]\n"


class _Text(Wire):
    text: str


class _LlmMessage(Wire):
    role: Role
    content: str | None = None
    reasoning_content: str | None = None

    _join = field_validator("content", mode="before")(join_text)


class _Call(Wire):
    id: str | None = None
    name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    _parse = field_validator("arguments", mode="before")(parse_arguments)


class _Observation(Wire):
    content: str | None = None
    is_error: bool = False

    _join = field_validator("content", mode="before")(join_text)


class _Event(Wire):
    kind: str
    system_prompt: _Text | None = None
    tools: list[dict[str, Any]] = []
    llm_message: _LlmMessage | None = None
    extended_content: str | None = None
    thought: str | None = None
    reasoning_content: str | None = None
    tool_call: _Call | None = None
    tool_call_id: str | None = None
    llm_response_id: str | None = None
    observation: _Observation | None = None
    error: str | None = None
    rejection_reason: str | None = None
    summary: str | None = None

    _join = field_validator("extended_content", "thought", mode="before")(join_text)


class _Record(Wire):
    events: list[_Event] = Field(min_length=1)


@dataclass
class _Conversation(EventConversation):
    response: str | None = None
    """The model's answer that the last message is of."""

    def say(self, message: Message, origin: str, response: str | None = None) -> None:
        super().say(message, origin)
        self.response = response


class OpenHandsV1:
    """See the module's text."""

    name = "openhands-v1"
    describes = "OpenHands V1 events, a file for each run"

    def claims(self, keys: frozenset[str]) -> bool:
        return {"kind", "id", "source"} <= keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        """The events of the file as one record; a line that is no JSON is refused with it all."""
        events = []
        for record in read_records(file):
            if record.problem is not None:
                yield replace(record, text=file.read_bytes())
                return
            events.append(record.value)
        yield SourceRecord(None, None, events)

    def draft(self, value: Any) -> Draft:
        events = value if isinstance(value, list) else [value]
        record = _Record.model_validate({"events": events})
        made = _Conversation()
        for number, (event, raw) in enumerate(zip(record.events, events)):
            _take(made, event, raw, f"events.{number}")
        return made.draft(metadata={})


def _take(made: _Conversation, event: _Event, raw: Json, origin: str) -> None:
    metadata: Json = {"event": raw}
    match event.kind:
        case "SystemPromptEvent" if event.system_prompt is not None:
            made.tools += event.tools
            made.say(Message("system", event.system_prompt.text, metadata=metadata), origin)
        case "MessageEvent" if event.llm_message is not None:
            said = event.llm_message
            text = (said.content or "") + (event.extended_content or "")
            made.say(Message(said.role, text, said.reasoning_content, metadata=metadata), origin)
        case "ActionEvent" if event.tool_call is not None:
            _act(made, event, metadata, origin)
        case "CondensationSummaryEvent":
            made.say(Message("user", event.summary or "", metadata=metadata), origin)
        case "ObservationEvent" | "AgentErrorEvent" | "UserRejectObservation":
            _observe(made, event, metadata, origin)
        case _:
            made.unseen.append(raw)


def _act(made: _Conversation, event: _Event, metadata: Json, origin: str) -> None:
    assert event.tool_call is not None
    call = ToolCall(event.tool_call.name, event.tool_call.arguments, event.tool_call.id or event.tool_call_id)
    response = event.llm_response_id
    if response is not None and made.response == response and made.messages[-1].role == "assistant":
        message = made.messages[-1]
        message.metadata.setdefault("more_events", []).append(metadata["event"])
        made.messages[-1] = replace(message, tool_calls=(*message.tool_calls, call))
        return
    made.say(
        Message("assistant", event.thought or None, event.reasoning_content or None, (call,),
                metadata=metadata),
        origin, response,
    )  # fmt: skip


def _observe(made: _Conversation, event: _Event, metadata: Json, origin: str) -> None:
    if event.kind == "AgentErrorEvent":
        text = event.error or ""
    elif event.kind == "UserRejectObservation":
        text = f"Action rejected: {event.rejection_reason or ''}"
    else:
        seen = event.observation or _Observation()
        text = (_ERROR if seen.is_error else "") + (seen.content or "") + (event.extended_content or "")
    known = {call.id for message in made.messages for call in message.tool_calls}
    if event.tool_call_id in known:
        made.say(Message("tool", text, tool_call_id=event.tool_call_id, metadata=metadata), origin)
    else:
        made.say(Message("user", text, metadata=metadata), origin)
