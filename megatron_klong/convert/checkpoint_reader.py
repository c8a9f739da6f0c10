"""Reads rows of single tensors of a distributed checkpoint that was saved at any layout.

torch's reader loads a whole stored chunk to give a part of it. Here the chunk's bytes are found in its record
once, and only those of the rows are read, straight into their place.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from megatron_klong.convert.safetensors_file import DTYPES
from megatron_klong.convert.stored import Piece, StoredTensor


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint of torch's distributed format, without process groups."""

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """What the checkpoint says of itself; a pickle, as torch writes it."""
        try:
            return FileSystemReader(self.folder).read_metadata()
        except Exception as error:  # a pickle raises whatever its bytes lead to
            raise ValueError(f"{self.folder}: its .metadata cannot be read: {error}") from error

    def check(self, stored: Sequence[StoredTensor]) -> dict[str, int]:
        """Compare names, shapes, types and files with what the model wants; counts of what is left out.

        Raises:
            ValueError: names the first tensor that does not fit.
        """
        held = self.metadata.state_dict_metadata
        for tensor in stored:
            found = held.get(tensor.key)
            if not isinstance(found, TensorStorageMetadata):
                raise ValueError(f"{self.folder}: tensor {tensor.key!r} is missing")
            if tuple(found.size) != tensor.shape:
                raise ValueError(
                    f"{self.folder}: tensor {tensor.key!r} has shape {tuple(found.size)}, the config "
                    f"wants {tensor.shape}"
                )
            if found.properties.dtype not in DTYPES:
                raise ValueError(
                    f"{self.folder}: tensor {tensor.key!r} has data type {found.properties.dtype}, not one "
                    f"of {', '.join(map(str, DTYPES))}"
                )
            self._check_chunks(tensor.key, found)
        keys = {tensor.key for tensor in stored}
        others = [key for key, kind in held.items() if isinstance(kind, TensorStorageMetadata)]
        unknown = [key for key in others if key not in keys and not key.startswith("optimizer.")]
        if unknown:
            raise ValueError(f"{self.folder}: tensor {unknown[0]!r} is none of the config's model")
        rest = len(others) - len(stored)
        return {"optimizer state": rest} if rest else {}

    def dtype(self, key: str) -> torch.dtype:
        """Data type of a tensor."""
        return self._tensor(key).properties.dtype

    def read(self, key: str, piece: Piece) -> Tensor:
        """Rows of a tensor."""
        found = self._tensor(key)
        wanted = torch.empty(
            [piece.stop - piece.start, *found.size[1:]], dtype=found.properties.dtype
        )  # fmt: skip
        for chunk in found.chunks:
            start, stop = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low < high:
                place = [slice(low - piece.start, high - piece.start)]
                place += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:])]
                self._fill(wanted[tuple(place)], key, chunk, low - start)
        return wanted

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _check_chunks(self, key: str, found: TensorStorageMetadata) -> None:
        if sum(math.prod(chunk.sizes) for chunk in found.chunks) != math.prod(found.size):
            raise ValueError(f"{self.folder}: the parts of tensor {key!r} do not make up the whole")
        for chunk in found.chunks:
            info = self.metadata.storage_data.get(MetadataIndex(key, chunk.offsets))
            if info is None:
                raise ValueError(f"{self.folder}: a part of tensor {key!r} is in no file")
            file = self.folder / info.relative_path
            held = file.stat().st_size if file.is_file() else 0
            if held < info.offset + info.length:
                raise ValueError(
                    f"{self.folder}: tensor {key!r} ends at byte {info.offset + info.length} of "
                    f"{info.relative_path}, which has {held} bytes: missing, or cut short"
                )

    def _fill(self, place: Tensor, key: str, chunk: ChunkStorageMetadata, first_row: int) -> None:
        """Read as many rows of a chunk as ``place`` has, beginning with ``first_row``."""
        info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        path = self.folder / info.relative_path
        straight = place if place.is_contiguous() else torch.empty(place.shape, dtype=place.dtype)
        row = math.prod(chunk.sizes[1:]) * place.dtype.itemsize
        with path.open("rb") as file:
            try:
                begin = _payload(file, info.offset, info.length, chunk, place.dtype)
            except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise ValueError(f"{path}: tensor {key!r} is damaged: {str(error)[:200]}") from error
            file.seek(begin + first_row * row)
            count = file.readinto(straight.view(-1).view(torch.uint8).numpy().data)
        if count != straight.nbytes:
            raise ValueError(f"{path}: tensor {key!r} ends after {count} of {straight.nbytes} bytes")
        if straight is not place:
            place.copy_(straight)


def _payload(
    file: IO[bytes], offset: int, length: int, chunk: ChunkStorageMetadata, dtype: torch.dtype
) -> int:
    """Where in a file the elements of a tensor begin that ``torch.save`` wrote at ``offset``.

    A record is a zip archive; its storage is an entry that is not compressed.
    """
    record = _Record(file, offset, length)
    # On the meta device nothing but the description is read.
    described: Tensor = torch.load(cast(IO[bytes], record), map_location="meta", weights_only=True)
    if described.size() != chunk.sizes or described.dtype != dtype or not described.is_contiguous():
        raise RuntimeError(f"holds {tuple(described.size())}, {described.dtype}, not what .metadata says")
    record.seek(0)
    (entry,) = [
        each
        for each in zipfile.ZipFile(cast(IO[bytes], record)).infolist()
        if each.filename.endswith("/data/0")
    ]
    assert entry.compress_type == zipfile.ZIP_STORED and described.storage_offset() == 0
    if entry.file_size != described.nbytes:
        raise RuntimeError(f"has {entry.file_size} bytes for {described.nbytes} of elements")
    file.seek(offset + entry.header_offset + 26)
    name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return offset + entry.header_offset + 30 + name + extra


class _Record(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file = file
        self._offset = offset
        self._length = length
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = start + offset
        return self._place

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer).cast("B")[: max(0, self._length - self._place)]
        self._file.seek(self._offset + self._place)
        count: int = self._file.readinto(view)  # type: ignore[attr-defined]
        self._place += count
        return count
