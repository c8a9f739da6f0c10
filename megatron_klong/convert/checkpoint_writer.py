"""Writes a distributed checkpoint piece by piece.

torch's own ``save`` plans all of it first and then keeps the last piece of every tensor in memory until the
end of a file; the format is a file of ``torch.save`` records and a table of where each begins.
"""

from __future__ import annotations

import io
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult

_DATA = "__0_0.distcp"
"""What torch calls the first file of the first rank."""


class CheckpointWriter:
    """A checkpoint in a folder; use it as a context manager. Its table is written at the end."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._table = Metadata(state_dict_metadata={})
        self._written: list[WriteResult] = []

    def __enter__(self) -> CheckpointWriter:
        self._file = (self._folder / _DATA).open("wb")
        return self

    def add_rows(self, key: str, rows: Tensor, start: int, shape: tuple[int, ...]) -> None:
        """Append rows of a tensor, those from ``start`` on of the whole of shape ``shape``."""
        offsets = torch.Size([start, *[0] * (len(shape) - 1)])
        held = self._table.state_dict_metadata.setdefault(
            key, TensorStorageMetadata(TensorProperties(dtype=rows.dtype), torch.Size(shape), [])
        )
        assert isinstance(held, TensorStorageMetadata) and held.properties.dtype == rows.dtype
        held.chunks.append(ChunkStorageMetadata(offsets, rows.size()))
        # A record has the whole storage of what it is given; that of a row slice is all rows.
        alone = rows.contiguous()
        if alone.untyped_storage().nbytes() != alone.nbytes:
            alone = alone.clone()
        self._append(MetadataIndex(key, offsets), alone)

    def add_object(self, key: str, value: object) -> None:
        """Append an object."""
        self._table.state_dict_metadata[key] = BytesStorageMetadata()
        self._append(MetadataIndex(key), value)

    def _append(self, index: MetadataIndex, value: object) -> None:
        # Not straight to the file: torch makes a RuntimeError of a full disk.
        record = io.BytesIO()
        torch.save(value, record)
        start, size = self._file.tell(), record.tell()
        self._file.write(record.getbuffer())
        self._written.append(WriteResult(index, size, _StorageInfo(_DATA, start, size)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is None:
            FileSystemWriter(self._folder).finish(self._table, [self._written])
