"""The header of a token store: what can be known without opening the tokens, or Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from megatron_klong.config import DataConfig, WindowConfig
from megatron_klong.window import ContextWindow

FORMAT_VERSION = 2
MARKER_TEXT = "[Earlier turns are omitted.]"
NOTE_TEXT = "\n[...]\n"
PARTS = ("bin", "idx", "marks", "turns", "trajectories.jsonl", "tokenizer.json", "json")
"""Suffixes of a store's files; the header comes last."""


@dataclass(frozen=True)
class StoreHeader:
    """What a store says of itself.

    Attributes:
        renderer: the chat format.
        tokenizer_sha256: of the ``tokenizer.json`` it was rendered with.
        vocab_size: of that tokenizer.
        opening_ids: what opens every assistant message.
        marker_ids: the message that stands where turns are omitted.
        note_ids: what stands where a block was cut.
        tool_sets: names of the tools that a turn calls, in order; turns name theirs by its number.
        trajectories: how many.
        tokens: in all blocks.
        trained_tokens: of them, those that carry loss.
        content_sha256: of blocks, marks, turns, trajectory list and what is above; two stores with the same
            hash are the same data.
    """

    version: int
    renderer: str
    tokenizer_sha256: str
    vocab_size: int
    opening_ids: tuple[int, ...]
    marker_ids: tuple[int, ...]
    note_ids: tuple[int, ...]
    tool_sets: tuple[tuple[str, ...], ...]
    trajectories: int
    tokens: int
    trained_tokens: int
    content_sha256: str


def part(prefix: Path, suffix: str) -> Path:
    """The file of a store with that suffix."""
    return prefix.with_name(f"{prefix.name}.{suffix}")


def read_header(prefix: Path) -> StoreHeader:
    """Read ``PREFIX.json``.

    Raises:
        ValueError: there is none, or it is of another format version.
    """
    file = part(prefix, "json")
    try:
        raw: Any = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"store {prefix}: no readable header {file.name}; run `klong data tokenize ... --out {prefix}`"
        ) from error
    if not isinstance(raw, dict) or "version" not in raw:
        raise ValueError(f"store {prefix}: {file.name} is no header of a store; tokenize again")
    if raw["version"] != FORMAT_VERSION:
        raise ValueError(
            f"store {prefix}: format version {raw['version']}, this package reads {FORMAT_VERSION}; "
            "tokenize again"
        )
    if {field.name for field in fields(StoreHeader)} != raw.keys():
        raise ValueError(f"store {prefix}: {file.name} is damaged; tokenize again")
    tuples = {name: tuple(raw[name]) for name in ("opening_ids", "marker_ids", "note_ids")}
    return StoreHeader(**{**raw, **tuples, "tool_sets": tuple(map(tuple, raw["tool_sets"]))})


def window_rule(config: WindowConfig, header: StoreHeader) -> ContextWindow:
    """The window rule for a store; ValueError for impossible settings."""
    return ContextWindow.from_config(
        config,
        marker_tokens=len(header.marker_ids),
        opener_tokens=len(header.opening_ids),
        note_tokens=len(header.note_ids),
    )


def held_out_trajectories(config: DataConfig, source: str, trajectories: int) -> int:
    """How many of a source's trajectories are held out, the last ones.

    Raises:
        ValueError: the fraction leaves none to train, or none to hold out although some are wanted.
    """
    fraction = config.held_out(source)
    held_out = round(trajectories * fraction)
    if (fraction and not held_out) or held_out == trajectories:
        raise ValueError(
            f"data.validation_fraction={fraction} of the {trajectories} trajectories of {source} leaves "
            f"{trajectories - held_out} to train and {held_out} to validate; change it, or set it to 0 "
            f"(data.sources.{source}.validation_fraction, for this source alone)"
        )
    return held_out


def read_headers(config: DataConfig) -> dict[str, StoreHeader]:
    """The headers of all sources of a config by name, checked against one another and the window.

    Raises:
        ValueError: one cannot be read, has another tokenizer than the first, or too few trajectories.
    """
    headers = {name: read_header(source.store) for name, source in config.sources.items()}
    first_name, first = next(iter(headers.items()))
    for name, header in headers.items():
        window_rule(config.window, header)
        held_out_trajectories(config, name, header.trajectories)
        if (header.renderer, header.tokenizer_sha256) != (first.renderer, first.tokenizer_sha256):
            raise ValueError(
                f"data.sources.{name}.store={config.sources[name].store}: was made with another tokenizer or "
                f"chat format than {first_name} ({config.sources[first_name].store}); tokenize both with the "
                "tokenizer of the model"
            )
    return headers
