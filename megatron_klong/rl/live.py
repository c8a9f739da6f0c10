"""The window rule of live agents, as settings and a renderer give it. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.config import WindowConfig
from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
from megatron_klong.trajectory.render import Renderer
from megatron_klong.window import ContextWindow


@dataclass(frozen=True)
class InsertedTokens:
    """See :class:`megatron_klong.data.windows.InsertedIds`."""

    opening_ids: tuple[int, ...]
    marker_ids: tuple[int, ...]
    note_ids: tuple[int, ...]


def live_rule(config: WindowConfig, renderer: Renderer) -> tuple[ContextWindow, InsertedTokens]:
    """The rule, and what it inserts; ValueError for impossible settings."""
    inserted = InsertedTokens(renderer.opening_ids, renderer.marker(MARKER_TEXT), renderer.note(NOTE_TEXT))
    rule = ContextWindow.from_config(
        config, marker_tokens=len(inserted.marker_ids), opener_tokens=len(inserted.opening_ids),
        note_tokens=len(inserted.note_ids),
    )  # fmt: skip
    return rule, inserted
