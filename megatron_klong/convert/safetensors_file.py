"""Writes a safetensors file tensor by tensor; the library's own writer wants all of them at once."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""Data types that weights may have, as the format calls them."""


@dataclass(frozen=True)
class Entry:
    """A tensor to come: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsWriter:
    """A file whose header is written first and whose tensors follow in the announced order.

    Format: 8 bytes little-endian length, a JSON header with dtype, shape and byte range of every
    tensor, then their bytes (https://github.com/huggingface/safetensors, "Format").
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        self._entries = list(entries)
        self._written = self._rows = 0
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for entry in entries:
            header[entry.name] = {
                "dtype": DTYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [start, start + entry.nbytes],
            }
            start += entry.nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # aligned, so that readers may map the data
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    @property
    def complete(self) -> bool:
        """Whether every announced tensor is in the file."""
        return self._written == len(self._entries)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next announced tensor, or the next rows of it."""
        entry = self._entries[self._written]
        assert (name, tuple(tensor.shape[1:]), tensor.dtype) == (entry.name, entry.shape[1:], entry.dtype)
        self._file.write(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data)
        self._rows += tensor.shape[0]
        assert self._rows <= entry.shape[0], name
        if self._rows == entry.shape[0]:
            self._written, self._rows = self._written + 1, 0

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
