"""OpenHands V0 ``output.jsonl``: one run a line; ``history`` is a list of actions and observations.

An assistant's message is what the model answered (``tool_call_metadata.model_response``); actions of one
answer share its id and become one message. An observation is the result of the call that its
``tool_call_metadata`` or its ``cause`` names; what a recall brings is a user's message. Events that no model
sees are kept in ``metadata.events``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_klong.trajectory.interchange.conversation import Draft, EventConversation
from megatron_klong.trajectory.interchange.openai_chat import OpenAIMessage, to_message
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire
from megatron_klong.trajectory.schema import Json, Message, ToolCall

_UNSEEN_ACTIONS = ("recall", "null", "change_agent_state", "condensation", "condensation_request",
                   "loop_recovery")  # fmt: skip
_UNSEEN_OBSERVATIONS = ("null", "agent_state_changed", "loop_detection")


class _Choice(Wire):
    message: OpenAIMessage


class _Response(Wire):
    id: str = ""
    choices: list[_Choice] = Field(min_length=1)


class _CallOf(Wire):
    tool_call_id: str
    function_name: str = ""
    model_response: _Response | None = None


class _Event(Wire):
    id: int | None = None
    source: str | None = None
    action: str | None = None
    observation: str | None = None
    args: dict[str, Any] = {}
    content: str | None = None
    message: str | None = None
    cause: int | None = None
    tool_call_metadata: _CallOf | None = None


class _Record(Wire):
    history: list[dict[str, Any]] = Field(min_length=1)
    instance_id: str | None = None


class _Events(Wire):
    history: list[_Event]


@dataclass
class _Conversation(EventConversation):
    calls: dict[int, str] = field(default_factory=dict)
    """By event id of an action: the id of its call."""


class OpenHandsV0:
    """See the module's text."""

    name = "openhands-v0"
    describes = "OpenHands V0 output.jsonl"

    def claims(self, keys: frozenset[str]) -> bool:
        return "history" in keys and bool({"instance_id", "test_result"} & keys)

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        record = _Record.model_validate(value)
        events = _Events.model_validate({"history": record.history}).history
        made = _Conversation()
        answers: dict[str, int] = {}
        for number, (event, raw) in enumerate(zip(events, record.history)):
            origin = f"history.{number}"
            if event.observation is not None:
                _observe(made, event, raw, origin)
            elif event.action in _UNSEEN_ACTIONS or event.action is None:
                made.unseen.append(raw)
            elif event.tool_call_metadata is not None and event.tool_call_metadata.model_response is not None:
                _answer(made, answers, event, raw, origin)
            else:
                _act(made, event, raw, origin)
        return made.draft(task_id=record.instance_id, metadata=record.unknown)


def _answer(made: _Conversation, answers: dict[str, int], event: _Event, raw: Json, origin: str) -> None:
    """An action that the model called for: its whole answer is the message, once."""
    assert event.tool_call_metadata is not None and event.tool_call_metadata.model_response is not None
    response = event.tool_call_metadata.model_response
    if event.id is not None:
        made.calls[event.id] = event.tool_call_metadata.tool_call_id
    place = answers.get(response.id) if response.id else None
    if place is not None:
        made.messages[place].metadata.setdefault("more_actions", []).append(raw)
        return
    if response.id:
        answers[response.id] = len(made.messages)
    message = to_message(response.choices[0].message)
    made.say(_with(message, {"action": _without(raw, "tool_call_metadata", "message")}), origin)


def _act(made: _Conversation, event: _Event, raw: Json, origin: str) -> None:
    """An action without a model's answer behind it."""
    text = event.args.get("content")
    text = text if isinstance(text, str) else event.message
    match event.action, event.source:
        case "system", _:
            tools = event.args.get("tools")
            made.tools += (
                [tool for tool in tools if isinstance(tool, dict)] if isinstance(tools, list) else []
            )
            made.say(Message("system", text, metadata={"action": _without(raw, "message")}), origin)
        case "message", "agent":
            made.say(Message("assistant", text, metadata={"action": raw}), origin)
        case _, "agent":
            thought = event.args.get("thought")
            call_id = f"event-{event.id}"
            arguments = {key: value for key, value in event.args.items() if key != "thought"}
            call = ToolCall(event.action or "", arguments, call_id)
            if event.id is not None:
                made.calls[event.id] = call_id
            content = thought if isinstance(thought, str) and thought else None
            made.say(Message("assistant", content, tool_calls=(call,), metadata={"action": raw}), origin)
        case _:
            made.say(Message("user", text, metadata={"action": raw}), origin)


def _observe(made: _Conversation, event: _Event, raw: Json, origin: str) -> None:
    """An observation: the result of a call, or else what a user says, or nothing that a model sees."""
    call_id = event.tool_call_metadata.tool_call_id if event.tool_call_metadata else None
    if call_id is None and event.cause is not None:
        call_id = made.calls.get(event.cause)
    if call_id is None and event.observation in _UNSEEN_OBSERVATIONS:
        made.unseen.append(raw)
        return
    metadata = {"observation": _without(raw, "content", "tool_call_metadata")}
    role = "user" if call_id is None else "tool"
    text = event.content if event.content is not None else event.message
    if event.observation == "recall":
        text = _recalled(raw, text)
    made.say(Message(role, text or "", tool_call_id=call_id, metadata=metadata), origin)  # type: ignore[arg-type]


def _recalled(raw: Json, text: str | None) -> str:
    """What a recall brings before the model: instructions and knowledge of the repository, in its extras."""
    extras = raw.get("extras")
    extras = extras if isinstance(extras, dict) else {}
    knowledge = extras.get("microagent_knowledge")
    found = [extras.get("repo_instructions"), extras.get("additional_agent_instructions")]
    found += (
        [each.get("content") for each in knowledge if isinstance(each, dict)]
        if isinstance(knowledge, list)
        else []
    )
    return "\n\n".join(each for each in (text, *found) if isinstance(each, str) and each)


def _with(message: Message, metadata: Json) -> Message:
    message.metadata.update(metadata)
    return message


def _without(raw: Json, *names: str) -> Json:
    return {key: value for key, value in raw.items() if key not in names}
