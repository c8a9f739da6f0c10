"""Shapes of published models and tiny ones of the same structure, as Hugging Face configs."""

from __future__ import annotations

from pathlib import Path

_FOLDER = Path(__file__).parent


def preset_names() -> list[str]:
    """Of all shapes that come with this package."""
    return sorted(file.stem for file in _FOLDER.glob("*.json"))


def preset_file(name: str) -> Path:
    """The config of a preset.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in preset_names():
        raise ValueError(f"model.preset={name!r}: known are {', '.join(preset_names())}")
    return _FOLDER / f"{name}.json"
