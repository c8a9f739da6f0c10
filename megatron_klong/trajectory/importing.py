"""Files of trajectories to one clean JSONL file; what is refused goes to quarantine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TextIO

from megatron_klong.trajectory.openai_chat import Refusal, read_openai_chat, write_openai_chat
from megatron_klong.trajectory.schema import Trajectory


@dataclass(frozen=True)
class ImportReport:
    """What an import did.

    Attributes:
        read: records found.
        kept: written to ``out``.
        refused: written to ``quarantine`` (None where nothing was).
        messages, assistant_messages: in the kept records.
        refusals: where and why, in order.
    """

    out: str
    quarantine: str | None
    read: int
    kept: int
    refused: int
    messages: int
    assistant_messages: int
    refusals: tuple[str, ...]


def import_trajectories(
    files: Iterable[Path], out: Path, on_record: Callable[[], None] = lambda: None
) -> ImportReport:
    """Read OpenAI chat JSONL files, write the good records to ``out``.

    A refused record is copied with its reason to ``OUT.quarantine.jsonl``. Both files appear under
    their names only when complete.

    Args:
        files: read in order.
        out: the JSONL file to write.
        on_record: called after each record, for progress.

    Raises:
        ValueError: a file cannot be read, or ``out`` is one of them.
    """
    files = list(files)
    quarantine = out.with_name(out.name + ".quarantine.jsonl")
    for written in (out, quarantine):
        if written.resolve() in {file.resolve() for file in files}:
            raise ValueError(f"--out {out}: {written} is also an input")
    refusals: list[Refusal] = []
    kept = messages = assistant = 0
    with written_when_complete(out) as good:
        for item in _records(files):
            if isinstance(item, Refusal):
                refusals.append(item)
            else:
                good.write(write_openai_chat(item) + "\n")
                kept += 1
                messages += len(item.messages)
                assistant += sum(message.role == "assistant" for message in item.messages)
            on_record()
    quarantine.unlink(missing_ok=True)
    if refusals:
        with written_when_complete(quarantine) as bad:
            bad.writelines(json.dumps(asdict(refusal), ensure_ascii=False) + "\n" for refusal in refusals)
    return ImportReport(
        out=str(out),
        quarantine=str(quarantine) if refusals else None,
        read=kept + len(refusals),
        kept=kept,
        refused=len(refusals),
        messages=messages,
        assistant_messages=assistant,
        refusals=tuple(str(refusal) for refusal in refusals),
    )


def read_imported(file: Path) -> Iterator[Trajectory]:
    """The records of an imported file.

    Raises:
        ValueError: a record is not valid: the file is not what ``klong data import`` wrote.
    """
    for item in _records([file]):
        if isinstance(item, Refusal):
            raise ValueError(f"{item}; run `klong data import` on this file first")
        yield item


def _records(files: Sequence[Path]) -> Iterator[Trajectory | Refusal]:
    seen: set[str] = set()
    stems = [file.stem for file in files]
    for number, file in enumerate(files, 1):
        alone = stems.count(file.stem) == 1
        try:
            yield from read_openai_chat(file, file.stem if alone else f"{file.stem}-{number}", seen)
        except OSError as error:
            raise ValueError(f"{file}: {error.strerror}") from error


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
