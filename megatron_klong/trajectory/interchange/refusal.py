"""What is said of a record that cannot be read."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError


class FieldError(ValueError):
    """A field of a record is wrong.

    Attributes:
        field: dotted path inside the record, ``""`` for the record itself.
        reason: what is wrong with it.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}" if field else reason)
        self.field = field
        self.reason = reason

    @classmethod
    def of(cls, error: ValidationError) -> FieldError:
        """The first thing that pydantic found."""
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        where = ".".join(str(part) for part in first["loc"])
        if isinstance(cause, FieldError):
            return cls(".".join(filter(None, (where, cause.field))), cause.reason)
        return cls(where, first["msg"].removeprefix("Value error, "))


@dataclass(frozen=True)
class Refusal:
    """A record that was not read.

    Attributes:
        file: where it stands.
        line: 1-based line number, in a file of one record a line.
        record: which record of a file that holds several otherwise, such as ``samples.3``.
        field: dotted path inside the record, ``""`` for the record itself.
        reason: what is wrong with it.
        raw: the record as it was, undecodable bytes escaped.
    """

    file: str
    line: int | None
    record: str | None
    field: str
    reason: str
    raw: str

    def __str__(self) -> str:
        where = self.file
        if self.line is not None:
            where += f":{self.line}"
        if self.record is not None:
            where += f": {self.record}"
        return f"{where}: {self.field}: {self.reason}" if self.field else f"{where}: {self.reason}"
