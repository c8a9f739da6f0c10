"""Folders that conversions read from and write to."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_klong.platform.lifetime import held_folder, to_disk

OnBytes = Callable[[int, int], None]
"""Told of the bytes done and of all bytes."""


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

    All of it is on the disk before it has that name.

    Args:
        size: bytes that will be written, at least.

    Raises:
        ValueError: the target exists and is not an empty folder, another process is making it, or the disk
            has not that much room.
    """
    target = target.resolve()
    if target.exists() and (os.path.ismount(target) or not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already; name a new folder, or delete it first")
    unfinished = target.with_name(f".{target.name}.unfinished")
    with held_folder(unfinished, f"{target}: another process is making it; wait for it"):
        for left in unfinished.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            free = shutil.disk_usage(unfinished).free
            if free < size:
                room = f"the disk has {free / 1e9:,.2f} GB left"
                raise ValueError(f"{target}: {size / 1e9:,.2f} GB will be written, and {room}")
            yield unfinished
            for path in (*unfinished.iterdir(), unfinished):
                to_disk(path)
            if target.exists():
                target.rmdir()
            os.replace(unfinished, target)
            to_disk(target.parent)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


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
    raise ValueError(
        f"{folder}: no Megatron checkpoint here (no .metadata, no step_* folder), and no *.safetensors"
    )
