"""Reads single tensors, whole or in pieces, of a distributed checkpoint that was saved at any layout."""

from __future__ import annotations

import io
import os
import pickle
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

from megatron_klong.convert.stored import Piece, StoredTensor


@dataclass(frozen=True)
class CheckpointReader:
    """A checkpoint of torch's distributed format, without process groups and without a plan of all of it."""

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """What the checkpoint says of itself."""
        try:
            return FileSystemReader(self.folder).read_metadata()
        except Exception as error:  # it is a pickle, and raises whatever its bytes lead to
            raise ValueError(f"{self.folder}: its .metadata cannot be read: {error}") from error

    def check(self, stored: Sequence[StoredTensor]) -> dict[str, int]:
        """Compare names, shapes and files with what the model wants; counts of what is left out.

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
            for chunk in found.chunks:
                self._check_file(tensor.key, chunk)
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

    def pieces(self, tensor: StoredTensor) -> list[Piece]:
        """How a tensor is best read: as it was written, where it can be converted in pieces at all."""
        found = self._tensor(tensor.key)
        rows = found.size[0]
        if not (tensor.stacked or tensor.is_same):
            return [Piece(0, rows)]
        bounds = sorted({rows, *(chunk.offsets[0] for chunk in found.chunks)})
        return [Piece(start, stop) for start, stop in zip(bounds, bounds[1:])]

    def read(self, key: str, piece: Piece) -> Tensor:
        """A piece of a tensor along its first dimension; one whole chunk is not copied."""
        found = self._tensor(key)
        size = torch.Size([piece.stop - piece.start, *found.size[1:]])
        wanted: Tensor | None = None
        for chunk in found.chunks:
            start, stop = chunk.offsets[0], chunk.offsets[0] + chunk.sizes[0]
            low, high = max(start, piece.start), min(stop, piece.stop)
            if low >= high:
                continue
            loaded = self._load(key, chunk)
            if chunk.sizes == size and low == piece.start:
                return loaded
            if wanted is None:
                wanted = torch.empty(size, dtype=found.properties.dtype)
            place = [slice(low - piece.start, high - piece.start)]
            place += [slice(o, o + s) for o, s in zip(chunk.offsets[1:], chunk.sizes[1:])]
            wanted[tuple(place)] = loaded[low - start : high - start]
        assert wanted is not None, key
        return wanted

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found

    def _check_file(self, key: str, chunk: ChunkStorageMetadata) -> None:
        info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self.folder / info.relative_path
        held = file.stat().st_size if file.is_file() else 0
        if held < info.offset + info.length:
            raise ValueError(
                f"{self.folder}: tensor {key!r} ends at byte {info.offset + info.length} of "
                f"{info.relative_path}, which has {held} bytes: missing, or cut short"
            )

    def _load(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self.metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        file = self.folder / info.relative_path
        with _FileSlice(file, info.offset, info.length) as stream:
            try:
                loaded: Tensor = torch.load(cast(IO[bytes], stream), map_location="cpu", weights_only=True)
            except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
                raise ValueError(f"{file}: tensor {key!r} is damaged: {str(error)[:200]}") from error
        return loaded


class _FileSlice(io.RawIOBase):
    """Bytes of a file as a file of their own, read straight into the reader's memory."""

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._handle = os.open(path, os.O_RDONLY)
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
        count = os.preadv(self._handle, [view], self._offset + self._place) if len(view) else 0
        self._place += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self._handle)
        super().close()
