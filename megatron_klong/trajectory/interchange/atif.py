"""ATIF, the trajectory format of Harbor's RFC 0001: read from 1.0 to 1.8, written as 1.7.

A step is a message; the results in its ``observation`` are tool messages (user messages where the step
makes no call). Copied context (``is_copied_context``) and steps that no model made (``llm_call_count`` 0)
are context. Embedded trajectories of subagents are records of their own. What a step has beside its message
(times, metrics with token ids and log-probs) is in ``metadata.step``.

Written, whatever ATIF has no place for stands in ``extra.megatron_klong``; so reading gives an equal record.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire, join_text
from megatron_klong.trajectory.schema import Json, Message, Role, ToolCall, Trajectory

WRITTEN = "ATIF-v1.7"
_OURS = "megatron_klong"
_VERSION = r"^ATIF-v1\.[0-8]$"
_ROLES: dict[str, Role] = {"user": "user", "system": "system", "agent": "assistant"}
_SOURCES = {role: source for source, role in _ROLES.items()}
_SILENT = "results_without_content"
_STEP_FIELDS = frozenset(
    ("timestamp", "model_name", "reasoning_effort", "metrics", "llm_call_count", "extra", _SILENT)
)
_AGENT_FIELDS = frozenset(("model_name", "reasoning_effort", "metrics"))
_RESULT_FIELDS = frozenset(("subagent_trajectory_ref", "extra"))
_ROOT_FIELDS = frozenset(
    ("schema_version", "session_id", "agent", "notes", "final_metrics", "continued_trajectory_ref", "extra")
)


class _Call(Wire):
    tool_call_id: str
    function_name: str = Field(min_length=1)
    arguments: dict[str, Any] = {}


class _Result(Wire):
    source_call_id: str | None = None
    content: str | None = None

    _join = field_validator("content", mode="before")(join_text)


class _Observation(Wire):
    results: list[_Result] = []


class _Step(Wire):
    source: Literal["system", "user", "agent"]
    step_id: int | None = None
    message: str = ""
    reasoning_content: str | None = None
    tool_calls: list[_Call] = []
    observation: _Observation | None = None
    is_copied_context: bool = False
    llm_call_count: int | None = None

    _join = field_validator("message", mode="before")(join_text)


class _Agent(Wire):
    tool_definitions: list[dict[str, Any]] = []


class _Root(Wire):
    schema_version: str = Field(pattern=_VERSION)
    agent: _Agent
    steps: list[_Step] = Field(min_length=1)
    trajectory_id: str | None = None


class Atif:
    """See the module's text."""

    name = "atif"
    describes = "ATIF 1.0 to 1.8 (Harbor)"

    def claims(self, keys: frozenset[str]) -> bool:
        return {"schema_version", "steps"} <= keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        for record in read_records(file):
            yield from _with_subagents(record)

    def draft(self, value: Any) -> Draft:
        root = _Root.model_validate(value)
        messages: list[Message] = []
        origins: list[str] = []
        for number, step in enumerate(root.steps):
            try:
                made = _messages(step)
            except FieldError as error:
                raise FieldError(f"steps.{number}.{error.field}", error.reason) from error
            messages += made
            origins += [f"steps.{number}"] * len(made)
        ours, kept = _beside(root)
        kept.pop("subagent_trajectories", None)  # records of their own
        if not ours.get("no_agent"):
            kept["agent"] = root.agent.unknown
        version = ours.get("schema_version", root.schema_version)
        if version != WRITTEN:
            kept["schema_version"] = version
        metadata = {**({"atif": kept} if kept else {}), **ours.get("metadata", {})}
        return Draft(
            tuple(messages), id=root.trajectory_id, tools=tuple(root.agent.tool_definitions),
            task_id=ours.get("task_id"), reward=ours.get("reward"),
            prefix_messages=ours.get("prefix_messages"), metadata=metadata, origins=tuple(origins),
        )  # fmt: skip


def _with_subagents(record: SourceRecord) -> Iterator[SourceRecord]:
    yield record
    embedded = record.value.get("subagent_trajectories") if isinstance(record.value, dict) else None
    for number, value in enumerate(embedded if isinstance(embedded, list) else ()):
        inner = f"subagent_trajectories.{number}"
        name = inner if record.record is None else f"{record.record}.{inner}"
        yield from _with_subagents(SourceRecord(record.line, name, value))


def _messages(step: _Step) -> list[Message]:
    """The message of a step, and those of its results."""
    ours, beside = _beside(step)
    calls = {call.tool_call_id: _call(call) for call in step.tool_calls}
    if len(calls) < len(step.tool_calls):
        raise FieldError("tool_calls", "a tool_call_id is used twice")
    results = step.observation.results if step.observation else []
    answers = [_result(result, calls) for result in results if result.content is not None]
    if ours.get("only_results"):
        return answers
    silent = [result.model_dump(exclude_unset=True) for result in results if result.content is None]
    if silent:
        beside[_SILENT] = silent
    if step.llm_call_count is not None:
        beside["llm_call_count"] = step.llm_call_count
    message = Message(
        role=_ROLES[step.source],
        content=None if ours.get("no_content") else step.message,
        reasoning_content=ours.get("reasoning_content", step.reasoning_content),
        tool_calls=tuple(calls.values()),
        context_only=step.is_copied_context or step.llm_call_count == 0,
        cut=bool(ours.get("cut")),
        metadata={**({"step": beside} if beside else {}), **ours.get("metadata", {})},
    )
    return [message, *answers]


def _call(call: _Call) -> ToolCall:
    ours, beside = _beside(call)
    call_id = None if ours.get("no_id") else call.tool_call_id
    return ToolCall(call.function_name, call.arguments, call_id, {**beside, **ours.get("metadata", {})})


def _result(result: _Result, calls: dict[str, ToolCall]) -> Message:
    """The message of a result. One that names no call is taken as that of the step's last call."""
    ours, beside = _beside(result)
    call_id = result.source_call_id
    if call_id in calls:
        call_id = calls[call_id].id
    elif call_id is None and calls:
        call_id = list(calls.values())[-1].id
    elif ours.get("tool"):
        call_id = ours.get("tool_call_id")
    return Message(
        role="tool" if calls or ours.get("tool") or call_id is not None else "user",
        content=None if ours.get("no_content") else result.content,
        reasoning_content=ours.get("reasoning_content"),
        tool_call_id=call_id,
        context_only=bool(ours.get("context_only")),
        metadata={**({"result": beside} if beside else {}), **ours.get("metadata", {})},
    )


def _beside(part: Wire) -> tuple[Json, Json]:
    """What we wrote into the extra of a part, and its fields that have no place in the schema."""
    beside, extra = part.unknown, part.unknown.get("extra")
    if not isinstance(extra, dict) or not isinstance(extra.get(_OURS), dict):
        return {}, beside
    others = {name: item for name, item in extra.items() if name != _OURS}
    del beside["extra"]
    return extra[_OURS], beside | ({"extra": others} if others else {})


@dataclass
class _Written:
    """Steps so far."""

    steps: list[Json] = field(default_factory=list)
    ids: dict[str | None, str] = field(default_factory=dict)
    """Of the calls of the last step, if that is an agent's: ours to ATIF's, which has no calls without id."""

    def add(self, step: Json, ids: dict[str | None, str]) -> None:
        self.steps.append({"step_id": len(self.steps) + 1, **step})
        self.ids = ids


def write_atif(trajectory: Trajectory) -> str:
    """One JSON document on one line; :class:`Atif` reads it back as an equal record."""
    written = _Written()
    for message in trajectory.messages:
        if message.role == "tool":
            _write_result(written, message)
        else:
            _write_step(written, message)
    native, rest = _native(trajectory.metadata, "atif", _ROOT_FIELDS)
    agent, version = native.pop("agent", None), native.pop("schema_version", None)
    ours = {
        "metadata": rest, "task_id": trajectory.task_id, "reward": trajectory.reward,
        "prefix_messages": trajectory.prefix_messages, "no_agent": agent is None or None,
        "schema_version": version,
    }  # fmt: skip
    described = {"name": "unknown", "version": "unknown"} if agent is None else agent
    if trajectory.tools:
        described = {**described, "tool_definitions": list(trajectory.tools)}
    root = {"schema_version": WRITTEN, "trajectory_id": trajectory.id, "agent": described,
            "steps": written.steps, **native}  # fmt: skip
    return json.dumps(_with_ours(root, ours), ensure_ascii=False, allow_nan=False)


def _write_step(written: _Written, message: Message) -> None:
    agent = message.role == "assistant"
    native, rest = _native(message.metadata, "step", _STEP_FIELDS if agent else _STEP_FIELDS - _AGENT_FIELDS)
    ours: Json = {"metadata": rest, "cut": message.cut or None, "no_content": message.content is None or None}
    if native.get("llm_call_count") == 0 and not message.context_only:
        native, ours["metadata"] = {}, message.metadata  # as ATIF has it, this would be context
    ids = {call.id: call.id or f"call-{number}" for number, call in enumerate(message.tool_calls)}
    silent = native.pop(_SILENT, None)
    step: Json = {"source": _SOURCES[message.role], "message": message.content or "", **native}
    if message.reasoning_content is not None:
        if agent:
            step["reasoning_content"] = message.reasoning_content
        else:
            ours["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        step["tool_calls"] = [_write_call(call, ids[call.id]) for call in message.tool_calls]
    if silent is not None:
        step["observation"] = {"results": list(silent)}  # grows here; the trajectory is not ours to change
    if message.context_only:
        step["is_copied_context"] = True
    written.add(_with_ours(step, ours), ids)


def _write_call(call: ToolCall, call_id: str) -> Json:
    written = {"tool_call_id": call_id, "function_name": call.name, "arguments": call.arguments}
    return _with_ours(written, {"metadata": call.metadata, "no_id": call.id is None or None})


def _write_result(written: _Written, message: Message) -> None:
    """In the step that made the call, if that is the last one; else in a step of its own."""
    native, rest = _native(message.metadata, "result", _RESULT_FIELDS)
    ours: Json = {
        "metadata": rest, "reasoning_content": message.reasoning_content,
        "context_only": message.context_only or None,
        "no_content": message.content is None or None,
    }  # fmt: skip
    result: Json = {"content": message.content or "", **native}
    if message.tool_call_id in written.ids:
        result["source_call_id"] = written.ids[message.tool_call_id]
    else:
        ours |= {"tool": True, "tool_call_id": message.tool_call_id}
        written.add({"source": "system", "message": "", "extra": {_OURS: {"only_results": True}}}, {})
    step = written.steps[-1]
    step.setdefault("observation", {"results": []})["results"].append(_with_ours(result, ours))


def _native(metadata: Json, name: str, fields: frozenset[str]) -> tuple[Json, Json]:
    """What of the metadata has a field in ATIF, and the rest: nothing native where a part of it has none."""
    found = metadata.get(name)
    if not isinstance(found, dict) or not found or found.keys() - fields or not _reads_back(found):
        return {}, dict(metadata)
    return dict(found), {key: item for key, item in metadata.items() if key != name}


def _reads_back(found: Json) -> bool:
    """Whether fields that ATIF knows have a form that is read as it was written."""
    extra, agent, silent = found.get("extra"), found.get("agent"), found.get(_SILENT)
    right = {
        "extra": isinstance(extra, dict) and extra != {} and _OURS not in extra,
        "agent": isinstance(agent, dict)
        and {"name", "version"} <= agent.keys()
        and "tool_definitions" not in agent,
        _SILENT: isinstance(silent, list)
        and silent != []
        and all(isinstance(each, dict) and "content" not in each for each in silent),
        "llm_call_count": type(found.get("llm_call_count")) is int,
        "schema_version": isinstance(found.get("schema_version"), str) and found["schema_version"] != WRITTEN,
    }
    return all(right.get(name, True) for name in found)


def _with_ours(written: Json, ours: Json) -> Json:
    ours = {name: item for name, item in ours.items() if item is not None and item != {}}
    return {**written, "extra": {**written.get("extra", {}), _OURS: ours}} if ours else written
