"""Inspect logs: ``.json``, one document with ``samples``, and ``.eval``, a zip with a member for each sample.

Long texts stand in a sample's ``attachments`` and are put back. The tools are those that the first model
event describes. Of a sample's other fields all are kept in ``metadata`` but the events, which repeat the
conversation at every call, and the attachments.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import ijson
import zstandard
from pydantic import Field, field_validator

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.interchange.sources import SourceRecord, json_items, parse_json
from megatron_klong.trajectory.interchange.wire import Wire, join_text, parse_arguments
from megatron_klong.trajectory.schema import Json, Message, Role, ToolCall

_ATTACHMENT = ("attachment://", "tc://")
_GRADES = {"C": 1.0, "P": 0.5, "I": 0.0, "N": 0.0}  # Inspect's own values of its letters
_ZSTANDARD = 93
_LOCAL_HEADER = struct.Struct("<26xHH")


class _Call(Wire):
    id: str | None = None
    function: str = Field(min_length=1)
    arguments: dict[str, Any] = {}

    _parse = field_validator("arguments", mode="before")(parse_arguments)


class _Error(Wire):
    message: str = ""


class _Said(Wire):
    role: Role
    error: _Error | None = None
    content: str | list[Any] = ""
    tool_calls: list[_Call] = []
    tool_call_id: str | list[str] | None = None


class _Sample(Wire):
    messages: list[dict[str, Any]] = Field(min_length=1)
    id: str | int
    epoch: int = 1
    uuid: str | None = None
    attachments: dict[str, str] = {}
    events: list[Any] = []
    scores: dict[str, Any] = {}


class _Messages(Wire):
    messages: list[_Said]


class _Eval(Wire):
    task: str | None = None


class _Header(Wire):
    eval: _Eval = _Eval()


_DAMAGED = (
    zipfile.BadZipFile, zlib.error, zstandard.ZstdError, EOFError, OSError, ValueError, RuntimeError,
    NotImplementedError, struct.error,
)  # fmt: skip
"""What reading a zip raises where it is damaged, encrypted or packed in a way unknown here."""


class InspectLog:
    """See the module's text."""

    name = "inspect"
    describes = "Inspect logs, .json and .eval"

    def claims(self, keys: frozenset[str]) -> bool:
        return {"eval", "version"} <= keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        """A record for each sample; it is ``{"task": ..., "sample": ...}``."""
        if zipfile.is_zipfile(file):
            yield from _zipped(file)
            return
        with file.open("rb") as stream:
            task = _first(stream, "eval.task")
            stream.seek(0)
            for record in json_items(stream, "samples.item", "samples."):
                yield (
                    record
                    if record.problem
                    else replace(record, value={"task": task, "sample": record.value})
                )

    def draft(self, value: Any) -> Draft:
        sample = _Sample.model_validate(value["sample"])
        raw = [_attached(message, sample.attachments) for message in sample.messages]
        messages = tuple(
            _message(said, f"messages.{number}")
            for number, said in enumerate(_Messages.model_validate({"messages": raw}).messages)
        )
        task = value["task"] or "sample"
        return Draft(
            messages, id=_sample_id(task, sample), task_id=f"{task}-{sample.id}",
            tools=_tools(sample.events), reward=_reward(sample.scores),
            metadata={**sample.unknown, "scores": sample.scores, "epoch": sample.epoch},
        )  # fmt: skip


def _sample_id(task: str, sample: _Sample) -> str:
    """Another log of the same task has other uuids; older logs have none."""
    name = f"{task}-{sample.id}-{sample.epoch}"
    return name if sample.uuid is None else f"{name}-{sample.uuid}"


def _message(said: _Said, origin: str) -> Message:
    parts = said.content if isinstance(said.content, list) else [said.content]
    reasoning = [part for part in parts if isinstance(part, dict) and part.get("type") == "reasoning"]
    try:
        content = join_text([part for part in parts if part not in reasoning])
    except FieldError as error:
        raise FieldError(f"{origin}.content", error.reason) from error
    metadata = said.unknown
    if said.error is not None:
        metadata |= {"error": said.error.model_dump(exclude_unset=True), "content_beside_error": content}
    if reasoning:
        metadata["reasoning_parts"] = reasoning
    call_id = said.tool_call_id
    if isinstance(call_id, list):  # which calls a user's message goes with; it is not their result
        metadata["tool_call_ids"], call_id = call_id, None
    if said.error is not None:  # this is what the model was told
        content = f"Error: {said.error.message}"
    thoughts = [str(part.get("reasoning") or part.get("summary") or "") for part in reasoning]
    return Message(
        role=said.role,
        content=content,
        reasoning_content="\n".join(thoughts) or None,
        tool_calls=tuple(ToolCall(c.function, c.arguments, c.id, c.unknown) for c in said.tool_calls),
        tool_call_id=call_id,
        metadata=metadata,
    )


def _attached(value: Any, attachments: dict[str, str]) -> Any:
    """A value with the texts that it refers to; a reference to nothing stays as it is."""
    if isinstance(value, dict):
        return {key: _attached(item, attachments) for key, item in value.items()}
    if isinstance(value, list):
        return [_attached(item, attachments) for item in value]
    if isinstance(value, str):
        for scheme in _ATTACHMENT:
            if value.startswith(scheme):
                return attachments.get(value.removeprefix(scheme), value)
    return value


def _tools(events: list[Any]) -> tuple[Json, ...]:
    """The tools of the first model event that has any, in OpenAI's form."""
    for event in events:
        if isinstance(event, dict) and event.get("event") == "model" and event.get("tools"):
            tools = event["tools"] if isinstance(event["tools"], list) else []
            return tuple(
                {"type": "function", "function": {key: tool.get(key) for key in
                                                  ("name", "description", "parameters") if key in tool}}
                for tool in tools if isinstance(tool, dict)
            )  # fmt: skip
    return ()


def _reward(scores: dict[str, Any]) -> float | None:
    """The value of the only score, if there is one and it is a number or one of Inspect's letters."""
    values = [score.get("value") for score in scores.values() if isinstance(score, dict)]
    if len(values) != 1:
        return None
    (value,) = values
    if isinstance(value, str):
        return _GRADES.get(value)
    return float(value) if isinstance(value, int | float) else None


def _first(stream: BinaryIO, path: str) -> str | None:
    try:
        return next((str(value) for value in ijson.items(stream, path)), None)
    except (ijson.JSONError, UnicodeDecodeError):
        return None  # read_records will say so of the samples


def _zipped(file: Path) -> Iterator[SourceRecord]:
    try:
        with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
            names = set(archive.namelist())
            task = None
            for start in ("header.json", "_journal/start.json"):
                if start in names:
                    task = _Header.model_validate(parse_json(_member(archive, stream, start))).eval.task
                    break
            for name in sorted(names):
                if name.startswith("samples/") and name.endswith(".json") and name.count("/") == 1:
                    yield _read_member(archive, stream, name, task)
    except _DAMAGED as error:
        yield SourceRecord(None, None, None, FieldError("", f"a damaged archive: {error}"), b"")


def _read_member(archive: zipfile.ZipFile, stream: BinaryIO, name: str, task: str | None) -> SourceRecord:
    content = b""
    try:
        content = _member(archive, stream, name)
        return SourceRecord(None, name, {"task": task, "sample": parse_json(content)})
    except FieldError as error:
        return SourceRecord(None, name, None, error, content)
    except _DAMAGED as error:
        return SourceRecord(None, name, None, FieldError("", f"a damaged member: {error}"), b"")


def _member(archive: zipfile.ZipFile, stream: BinaryIO, name: str) -> bytes:
    """A member; Zstandard, which Inspect writes, is unknown to the zipfile of Python before 3.14."""
    info = archive.getinfo(name)
    if info.compress_type != _ZSTANDARD:
        return archive.read(name)
    stream.seek(info.header_offset)
    name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    stream.seek(name_length + extra_length, 1)
    packed = stream.read(info.compress_size)
    with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader:
        return reader.read()
