"""What a reader of a format is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.sources import SourceRecord


class Reader(Protocol):
    """Reads one format."""

    @property
    def name(self) -> str:
        """As ``--format`` takes it."""
        ...

    @property
    def describes(self) -> str:
        """What it reads, for people."""
        ...

    def claims(self, keys: frozenset[str]) -> bool:
        """Whether a file is of this format, by the keys of its first record."""
        ...

    def records(self, file: Path) -> Iterator[SourceRecord]:
        """The records of a file, one at a time.

        Raises:
            OSError: it cannot be read.
        """
        ...

    def draft(self, value: Any) -> Draft:
        """The conversation in a record.

        Raises:
            FieldError, pydantic.ValidationError: it is wrong; names the field.
        """
        ...
