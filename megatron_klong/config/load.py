"""YAML files and ``key=value`` overrides to config models, with errors a person can act on."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def load_config(model: type[Model], file: Path, overrides: Sequence[str] = ()) -> Model:
    """Read a YAML file, apply overrides in their order, and validate.

    Args:
        overrides: ``optimizer.lr=1e-4`` sets a key; ``@other.yaml`` all keys that another file has.

    Raises:
        ValueError: one line that names the file or key, the value and the remedy; for an unknown
            key, the nearest valid one.
    """
    values = _read(file)
    for override in overrides:
        if override.startswith("@"):
            _merge(values, _read(Path(override[1:])))
        else:
            _apply(values, override)
    return validate_config(model, values, str(file))


def validate_config(model: type[Model], values: dict[str, Any], origin: str) -> Model:
    """Validate parsed values; errors as in :func:`load_config`."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        # A typo shows as an unknown key and, where the key is required, as a missing one too.
        first = min(error.errors(), key=lambda each: each["type"] != "extra_forbidden")
        # A value of several possible types is tried as each; their names are no part of the key.
        path = [str(part) for part in first["loc"] if not str(part).startswith(("literal[", "tuple["))]
        rest = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise ValueError(f"config {origin}: {_explain(model, path, first)}{rest}") from error


def dump_config(config: BaseModel) -> str:
    """The resolved config as YAML; :func:`load_config` reads it back to an equal model."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def config_keys(model: type[BaseModel], above: str = "") -> Iterator[str]:
    """All dotted keys of a model, sections included; ``NAME`` stands for a name of the user's choice."""
    for name, field in model.model_fields.items():
        yield above + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                named = "NAME." if get_origin(field.annotation) is dict else ""
                yield from config_keys(part, f"{above}{name}.{named}")


def _read(file: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"config {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"config {file}: not UTF-8 at byte {error.start}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config {file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"config {file}: must be a mapping of sections")
    return values


def _merge(values: dict[str, Any], others: dict[str, Any]) -> None:
    for key, other in others.items():
        mine = values.get(key)
        if isinstance(mine, dict) and isinstance(other, dict):
            _merge(mine, other)
        else:
            values[key] = other


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write it as key=value, such as optimizer.lr=1e-4, or @FILE")
    *sections, last = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
        if not isinstance(place, dict):
            raise ValueError(f"override {override!r}: {section} is a value, not a section")
    place[last] = _scalar(text)


def _scalar(text: str) -> Any:
    """A value as YAML reads it, except that ``1e-4`` is a number (YAML 1.1 wants ``1.0e-4``)."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"override value {text!r}: not YAML; quote it") from error
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(model: type[BaseModel], path: list[str], error: Any) -> str:
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}{_hint(model, path)}"
    if error["type"] == "missing":
        return f"key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}={error['input']!r}: {message}" if key and error["type"] != "value_error" else message


def _hint(model: type[BaseModel], path: list[str]) -> str:
    """The valid key whose last part is nearest; of equal ones, that of the same section."""
    above = _section(model, path[:-1])
    keys = [key.rpartition(".") for key in config_keys(model)]
    siblings = {name: ".".join([*path[:-1], name]) for section, _, name in keys if section == above}
    everywhere = {name: f"{section}{dot}{name}" for section, dot, name in keys} | siblings
    if close := difflib.get_close_matches(path[-1], everywhere, n=1):
        return f"; did you mean {everywhere[close[0]]!r}?"
    return f"; valid here: {', '.join(siblings)}"


def _section(model: type[BaseModel], path: Sequence[str]) -> str:
    """A section as :func:`config_keys` writes it, with ``NAME`` for names of the user's choice."""
    parts: list[str] = []
    keys = set(config_keys(model))
    for name in path:
        parts.append(name if ".".join([*parts, name]) in keys else "NAME")
    return ".".join(parts)
