"""Whether inputs are the same as before, by content. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

_PIECE = 1 << 16
_PIECES = 16


def fingerprint(root: Path, files: Iterable[Path], *, whole: bool) -> str:
    """SHA-256 of files with their paths below ``root``, in order of these.

    Args:
        whole: of all their content; else of their sizes and of 16 pieces of each, evenly spaced, which tells
            one set of trained weights from another without reading 200 GB.
    """
    seen = hashlib.sha256()
    for file in sorted(files):
        size = file.stat().st_size
        seen.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with file.open("rb") as stream:
            if whole or size <= _PIECE * _PIECES:
                while piece := stream.read(1 << 20):
                    seen.update(piece)
                continue
            for number in range(_PIECES):
                stream.seek(number * (size - _PIECE) // (_PIECES - 1))
                seen.update(stream.read(_PIECE))
    return seen.hexdigest()


def weights_fingerprint(folder: Path) -> str:
    """Of a Hugging Face folder or a Megatron checkpoint."""
    kinds = ("*.safetensors", "*.distcp", "common.pt", ".metadata")
    return fingerprint(folder, [file for kind in kinds for file in folder.glob(kind)], whole=False)
