"""Imported trajectories to a token store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_klong.data.header import StoreHeader, read_header
from megatron_klong.data.store import TokenStoreWriter
from megatron_klong.trajectory.importing import read_imported
from megatron_klong.trajectory.render import load_renderer


def tokenize(
    file: Path,
    prefix: Path,
    *,
    renderer: str,
    tokenizer: Path,
    on_record: Callable[[], None] = lambda: None,
) -> StoreHeader:
    """Render every trajectory of an imported file once and write the store.

    Raises:
        ValueError: unknown renderer, unfit tokenizer, invalid record, or an empty file.
    """
    rendering = load_renderer(renderer, tokenizer)
    with TokenStoreWriter(prefix, rendering) as writer:
        for trajectory in read_imported(file):
            writer.add(trajectory, rendering.render(trajectory))
            on_record()
        if not writer.trajectories:
            raise ValueError(f"{file}: has no trajectories")
    return read_header(prefix)
