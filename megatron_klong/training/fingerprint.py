"""Whether inputs are the same as before, by content. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from megatron_klong.data.header import PARTS, part

_PIECE = 1 << 16
_PIECES = 16


def fingerprint(files: Mapping[str, Path], *, whole: bool) -> str:
    """SHA-256 of files with their names, in order of these.

    Args:
        files: by the name that counts.
        whole: of all their content; else of their sizes and of 16 pieces of each, evenly spaced, which tells
            one set of trained weights from another without reading 200 GB.
    """
    seen = hashlib.sha256()
    for name, file in sorted(files.items()):
        size = file.stat().st_size
        seen.update(f"{name}\0{size}\0".encode())
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
    return fingerprint({file.name: file for kind in kinds for file in folder.glob(kind)}, whole=False)


def store_fingerprint(prefix: Path) -> str:
    """Of a token store, whatever it is called now."""
    return fingerprint({suffix: part(prefix, suffix) for suffix in PARTS}, whole=False)
