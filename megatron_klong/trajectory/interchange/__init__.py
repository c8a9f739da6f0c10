"""Files of other harnesses, read and written: one module for each format."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import ijson

from megatron_klong.trajectory.interchange.atif import Atif
from megatron_klong.trajectory.interchange.base import Reader
from megatron_klong.trajectory.interchange.inspect_log import InspectLog
from megatron_klong.trajectory.interchange.mini_swe_agent import MiniSweAgent
from megatron_klong.trajectory.interchange.openai_chat import OpenAIChat
from megatron_klong.trajectory.interchange.openhands_v0 import OpenHandsV0
from megatron_klong.trajectory.interchange.openhands_v1 import OpenHandsV1
from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.interchange.sharegpt import ShareGpt
from megatron_klong.trajectory.interchange.sources import parse_json, shape_of
from megatron_klong.trajectory.interchange.swe_agent import SweAgent
from megatron_klong.trajectory.interchange.tau_bench import TauBench

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        reader.name: reader
        for reader in (
            Atif(), InspectLog(), OpenHandsV0(), OpenHandsV1(), SweAgent(), MiniSweAgent(), TauBench(),
            ShareGpt(), OpenAIChat(),
        )
    }
)  # fmt: skip
"""By the name that ``--format`` takes; of several that claim a file the first reads it."""

_KEYS = 64
_DEEPEST = 1000  # JSON of Python goes no deeper


def reader_of(file: Path, name: str) -> Reader:
    """The reader of that name, or with ``auto`` the one that claims the file by the keys of its first record.

    Raises:
        ValueError: there is no such reader, or none claims the file.
        OSError: the file cannot be read.
    """
    if name != "auto":
        if name not in READERS:
            raise ValueError(f"--format {name}: there are auto, {', '.join(READERS)}")
        return READERS[name]
    if zipfile.is_zipfile(file):
        return READERS["inspect"]
    keys = _first_keys(file)
    for reader in READERS.values():
        if reader.claims(keys):
            return reader
    if not keys:
        return READERS["openai"]  # it refuses each record with the reason
    seen = ", ".join(sorted(keys)[:8])
    raise ValueError(
        f"{file}: of no known format (its first record has {seen}); name one with --format: "
        f"{', '.join(READERS)}"
    )


def _first_keys(file: Path) -> frozenset[str]:
    """The keys of the first record that is an object; of a document, the first ones."""
    with file.open("rb") as stream:
        shape = shape_of(file, stream)
        if shape == "lines":
            for line in stream:
                try:
                    value = parse_json(line)
                except FieldError:
                    continue
                if isinstance(value, dict):
                    return frozenset(value)
            return frozenset()
        wanted = 2 if shape == "array" else 1
        keys: list[str] = []
        depth = 0
        try:
            for event, value in ijson.basic_parse(stream, use_float=True):
                depth += event.startswith("start_") - event.startswith("end_")
                if depth == wanted and event == "map_key":
                    keys.append(value)
                if len(keys) == _KEYS or depth > _DEEPEST or (depth < wanted and event == "end_map"):
                    break
        except (ijson.JSONError, UnicodeDecodeError):
            pass  # what came before may be enough; its reader says what is wrong
        return frozenset(keys)
