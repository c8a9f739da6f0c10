"""Files to records: a line of JSON each, an item of a JSON array each, or a whole JSON document."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from megatron_klong.trajectory.interchange.refusal import FieldError

_LONGEST_LINE = 1 << 28
"""A first line that is longer is taken for a document on one line."""

_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class SourceRecord:
    """A record of a file, parsed or not.

    Attributes:
        line: 1-based, in a file of one record a line.
        record: its name inside a file that holds several otherwise.
        value: what JSON says; None with a ``problem``.
        problem: why it is no JSON.
        text: as it was, for the quarantine file; None where ``value`` says it all.
    """

    line: int | None
    record: str | None
    value: Any
    problem: FieldError | None = None
    text: bytes | None = None

    @property
    def raw(self) -> str:
        """As it was, undecodable bytes escaped."""
        if self.text is not None:
            return self.text.decode("utf-8", "backslashreplace").rstrip("\n")
        try:
            return json.dumps(self.value, default=str)  # in ASCII: half a surrogate pair can be written too
        except (ValueError, RecursionError):
            return reprlib.repr(self.value)  # nested too deeply to be written


def read_records(file: Path) -> Iterator[SourceRecord]:
    """The records of a file, whichever way it holds them; one at a time where there are several.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        match shape_of(file, stream):
            case "lines":
                yield from json_lines(stream)
            case "array":
                yield from json_items(stream, "item", "")
            case _:
                yield json_line(stream.read(), None)


def shape_of(file: Path, stream: BinaryIO) -> str:
    """``lines``, ``array`` or ``document``; the stream stands at its beginning before and after."""
    if file.suffix in _LINES:
        return "lines"
    first = b""
    while not first.strip() and (line := stream.readline(_LONGEST_LINE)):
        first = line.removeprefix(b"\xef\xbb\xbf")
    more = any(line.strip() for line in iter(lambda: stream.readline(_LONGEST_LINE), b""))
    stream.seek(0)
    if first.lstrip().startswith(b"["):
        return "array"
    try:
        json.loads(first)
    except (ValueError, RecursionError):
        return "document"
    return "lines" if more else "document"


def json_lines(stream: BinaryIO) -> Iterator[SourceRecord]:
    """One record for each line; blank ones are passed over."""
    for number, line in enumerate(stream, 1):
        if line.strip():
            yield json_line(line, number)


def json_items(stream: BinaryIO, path: str, name: str) -> Iterator[SourceRecord]:
    """One record for each item of an array inside a document, none of them kept.

    Args:
        path: as ijson writes it, such as ``samples.item``.
        name: what stands before an item's number in errors.
    """
    number = 0
    try:
        for number, value in enumerate(ijson.items(stream, path, use_float=True), 1):
            yield SourceRecord(None, f"{name}{number - 1}", value)
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        problem = FieldError("", f"not JSON: {' '.join(str(error).split())}; nothing after it can be read")
        yield SourceRecord(None, f"{name}{number}", None, problem, b"")


def json_line(content: bytes, line: int | None) -> SourceRecord:
    """The record that is all of ``content``."""
    try:
        return SourceRecord(line, None, parse_json(content), text=content)
    except FieldError as error:
        return SourceRecord(line, None, None, error, content)


def parse_json(content: bytes) -> Any:
    """JSON in UTF-8, with or without a byte order mark; NaN and infinities are no JSON.

    Raises:
        FieldError: it is none.
    """

    def refuse(name: str) -> float:
        raise FieldError("", f"not JSON: {name} is not a JSON value")

    try:
        return json.loads(content.decode("utf-8-sig"), parse_constant=refuse)
    except FieldError:
        raise
    except UnicodeDecodeError as error:
        raise FieldError("", f"not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise FieldError("", "nested too deeply") from error
    except ValueError as error:  # also an integer of thousands of digits
        raise FieldError("", f"not JSON: {error}") from error
