"""How fields of foreign records are read."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from megatron_klong.trajectory.interchange.refusal import FieldError
from megatron_klong.trajectory.schema import Json


class Wire(BaseModel):
    """A record or a part of it. Fields that it does not name are kept in :attr:`unknown`; a null is the
    same as a field that is absent, as exports of tables write it."""

    model_config = ConfigDict(extra="allow", strict=False, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        known = cls.model_fields
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None or key not in known}

    @property
    def unknown(self) -> Json:
        """The fields that this model does not name."""
        return dict(self.model_extra or {})


def join_text(value: Any) -> Any:
    """Content that may be a list of text parts, as one text; for a validator of a ``str | None``.

    Raises:
        FieldError: a part is no text.
    """
    if not isinstance(value, list):
        return value
    return "".join(part if isinstance(part, str) else _text_part(part) for part in value)


def _text_part(part: Any) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise FieldError("", f"content part of type {kind!r}; only text is supported")


def parse_arguments(value: Any) -> Any:
    """Arguments of a call, which may be JSON in a string; nothing is no arguments.

    Raises:
        FieldError: they are no JSON object.
    """
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise FieldError("", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise FieldError("", "not a JSON object")
    return value
