"""Files of trajectories, of any format, to one clean JSONL file; what is refused goes to quarantine."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TextIO

from pydantic import ValidationError

from megatron_klong.trajectory.interchange import READERS, reader_of
from megatron_klong.trajectory.interchange.base import Reader
from megatron_klong.trajectory.interchange.conversation import Draft, check_draft
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.interchange.refusal import FieldError, Refusal
from megatron_klong.trajectory.interchange.sources import SourceRecord, json_line
from megatron_klong.trajectory.schema import Trajectory

_SHOWN = 20


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        read: records found.
        kept: written to ``out``.
        refused: written to ``quarantine`` (None where nothing was).
        messages, assistant_messages: in the kept records.
        formats: records kept, by the format they were read from.
        refusals: where and why, the first of them in order.
    """

    out: str
    quarantine: str | None
    read: int
    kept: int
    refused: int
    messages: int
    assistant_messages: int
    formats: dict[str, int]
    refusals: tuple[str, ...]


@dataclass
class _Tally:
    kept: int = 0
    refused: int = 0
    messages: int = 0
    assistant: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    refusals: list[str] = field(default_factory=list)


def import_trajectories(
    files: Iterable[Path], out: Path, *, format: str = "auto", on_record: Callable[[], None] = lambda: None
) -> ImportReport:
    """Read files, write the good records to ``out`` as OpenAI chat JSONL. One record is held at a time.

    A refused record is copied with its reason to ``OUT.quarantine.jsonl``. Both files appear under
    their names only when complete.

    Args:
        files: read in order.
        out: the JSONL file to write.
        format: of all files, or ``auto``: of each by itself.
        on_record: called after each record, for progress.

    Raises:
        ValueError: a file cannot be read or is of no known format, or ``out`` is one of them.
    """
    files = list(files)
    quarantine = out.with_name(out.name + ".quarantine.jsonl")
    for written in (out, quarantine):
        if written.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"--out {out}: {written} is also an input")
    tally = _Tally()
    with written_when_complete(out) as good, written_when_complete(quarantine) as bad:
        for name, item in _records(files, format):
            _take(item, name, tally, good, bad)
            on_record()
    if not tally.refused:
        quarantine.unlink()
    return ImportReport(
        out=str(out),
        quarantine=str(quarantine) if tally.refused else None,
        read=tally.kept + tally.refused,
        kept=tally.kept,
        refused=tally.refused,
        messages=tally.messages,
        assistant_messages=tally.assistant,
        formats=dict(tally.formats),
        refusals=tuple(tally.refusals),
    )


def _take(item: Trajectory | Refusal, name: str, tally: _Tally, good: TextIO, bad: TextIO) -> None:
    if isinstance(item, Refusal):
        tally.refused += 1
        bad.write(json.dumps(asdict(item), ensure_ascii=False) + "\n")
        if len(tally.refusals) < _SHOWN:
            tally.refusals.append(str(item))
        return
    good.write(write_openai_chat(item) + "\n")
    tally.kept += 1
    tally.messages += len(item.messages)
    tally.assistant += sum(message.role == "assistant" for message in item.messages)
    tally.formats[name] += 1


def read_file(
    file: Path, reader: Reader, name: str | None = None, seen: set[str] | None = None
) -> Iterator[Trajectory | Refusal]:
    """The trajectories of a file, and its refused records; never an error of a record.

    A record without an ``id`` gets the name, with its line or place behind it where the file holds several;
    the name is the file's stem unless given. A record whose id is in ``seen`` (ids of earlier records, added
    to as the file is read) is refused.

    Raises:
        OSError: the file cannot be read.
    """
    name = _name(file) if name is None else name
    seen = set() if seen is None else seen
    for record in reader.records(file):
        yield _read(record, reader, file, name, seen)


def _read(
    record: SourceRecord, reader: Reader, file: Path, name: str, seen: set[str]
) -> Trajectory | Refusal:
    place = ".".join(str(part) for part in (record.line, record.record) if part is not None)
    try:
        if record.problem is not None:
            raise record.problem
        trajectory = check_draft(_draft(reader, record), f"{name}-{place}" if place else name)
        if trajectory.id in seen:
            raise FieldError("id", f"{trajectory.id!r} was used by an earlier record")
    except FieldError as error:
        return Refusal(str(file), record.line, record.record, error.field, error.reason, record.raw)
    seen.add(trajectory.id)
    return trajectory


def _draft(reader: Reader, record: SourceRecord) -> Draft:
    try:
        return reader.draft(record.value)
    except ValidationError as error:
        raise FieldError.of(error) from error
    except UnicodeEncodeError as error:
        raise FieldError("", "has half of a surrogate pair, which is no text") from error
    except RecursionError as error:
        raise FieldError("", "nested too deeply") from error


def read_imported(file: Path) -> Iterator[Trajectory]:
    """The records of an imported file.

    Raises:
        ValueError: a record is not valid: the file is not what ``klong data import`` wrote.
    """
    for _, item in _records([file], "openai"):
        if isinstance(item, Refusal):
            raise ValueError(f"{item}; run `klong data import` on this file first")
        yield item


def read_imported_lines(file: Path, start: int, stop: int) -> Iterator[Trajectory]:
    """The records of an imported file whose lines begin in a stretch of it, in bytes.

    Raises:
        ValueError: a record is not valid: the file is not what ``klong data import`` wrote.
    """
    with file.open("rb") as stream:
        stream.seek(max(0, start - 1))
        if start:
            stream.readline()  # the rest of a line that begins before, or its line feed
        while (at := stream.tell()) < stop and (line := stream.readline()):
            if not line.strip():
                continue
            item = _read(json_line(line, None), READERS["openai"], file, "", set())
            if not isinstance(item, Refusal) and not item.id:
                item = Refusal(str(file), None, None, "id", "is missing", "")
            if isinstance(item, Refusal):
                found = replace(item, line=_line_number(file, at))
                raise ValueError(f"{found}; run `klong data import` on this file first")
            yield item


def _line_number(file: Path, at: int) -> int:
    with file.open("rb") as stream:
        return 1 + sum(1 for line in iter(stream.readline, b"") if stream.tell() <= at)


def _records(files: list[Path], format: str) -> Iterator[tuple[str, Trajectory | Refusal]]:
    """All records with the name of the format that each was read as."""
    seen: set[str] = set()
    names = [_name(file) for file in files]
    for number, (file, name) in enumerate(zip(files, names), 1):
        try:
            reader = reader_of(file, format)
            unique = name if names.count(name) == 1 else f"{name}-{number}"
            for item in read_file(file, reader, unique, seen):
                yield reader.name, item
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror or error}") from error


def _name(file: Path) -> str:
    """What ids of records are made of where they have none: the file's name up to its known endings."""
    return (
        file.name.removesuffix(".json")
        .removesuffix(".jsonl")
        .removesuffix(".traj")
        .removesuffix(".trajectory")
    )


@contextmanager
def written_when_complete(file: Path) -> Iterator[TextIO]:
    """Write a text file beside its final name and rename it at the end; on an error, remove it."""
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as stream:
            yield stream
        os.replace(unfinished, file)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    finally:
        unfinished.unlink(missing_ok=True)
