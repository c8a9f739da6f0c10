"""The header of a token store: what can be known without opening the tokens, or Megatron."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_klong.config import WindowConfig
from megatron_klong.window import ContextWindow

FORMAT_VERSION = 1
MARKER_TEXT = "[Earlier turns are omitted.]"
NOTE_TEXT = "\n[...]\n"
PARTS = ("bin", "idx", "mask", "trajectories.jsonl", "json")
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
        trajectories: how many.
        tokens: in all blocks.
        trained_tokens: of them, those with loss mask 1.
        content_sha256: of tokens, mask and trajectory list; two stores with the same hash are the
            same data.
    """

    version: int
    renderer: str
    tokenizer_sha256: str
    vocab_size: int
    opening_ids: tuple[int, ...]
    marker_ids: tuple[int, ...]
    note_ids: tuple[int, ...]
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
        raw: dict[str, Any] = json.loads(file.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"store {prefix}: no readable header {file.name}; run `klong data tokenize ... --out {prefix}`"
        ) from error
    if raw.get("version") != FORMAT_VERSION:
        raise ValueError(
            f"store {prefix}: format version {raw.get('version')}, this package reads {FORMAT_VERSION}; "
            "tokenize again"
        )
    ids = {name: tuple(raw[name]) for name in ("opening_ids", "marker_ids", "note_ids")}
    return StoreHeader(**{**raw, **ids})


def window_rule(config: WindowConfig, header: StoreHeader) -> ContextWindow:
    """The window rule for a store; ValueError for impossible settings."""
    return ContextWindow.from_config(
        config,
        marker_tokens=len(header.marker_ids),
        opener_tokens=len(header.opening_ids),
        note_tokens=len(header.note_ids),
    )
