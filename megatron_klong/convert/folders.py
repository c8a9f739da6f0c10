"""Folders that conversions read from and write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion did.

    Attributes:
        source, target: folders.
        tensors: tensors written.
        bytes: bytes of their data.
        left_out: tensors of the source that the model does not have, by reason.
    """

    source: Path
    target: Path
    tensors: int
    bytes: int
    left_out: dict[str, int]


@contextmanager
def complete_or_absent(target: Path, size: int) -> Iterator[Path]:
    """A folder to write into that gets the name ``target`` only when the block ends well.

    Args:
        size: bytes that will be written, at least.

    Raises:
        ValueError: the target exists and is not an empty folder, or the disk has not that much room.
    """
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder, or delete it first")
    unfinished = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        free = shutil.disk_usage(unfinished).free
        if free < size:
            raise ValueError(
                f"{target}: {size / 1e9:,.2f} GB will be written, and the disk has {free / 1e9:,.2f} GB left"
            )
        yield unfinished
        if target.exists():
            target.rmdir()
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint meant by a folder: itself, or the newest ``step_*`` in it or its ``checkpoints``.

    Raises:
        ValueError: none is there.
    """
    if (folder / ".metadata").is_file():
        return folder
    for place in (folder, folder / "checkpoints"):
        found = sorted(path.parent for path in place.glob("step_*/.metadata"))
        if found:
            return found[-1]
    raise ValueError(f"{folder}: no Megatron distributed checkpoint here (no .metadata, no step_* folder)")
