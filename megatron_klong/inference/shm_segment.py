"""A piece of shared memory that two processes map, and tensors in it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_PLACE = Path("/dev/shm")
_ALIGN = 64


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in a segment.

    Attributes:
        name: Hugging Face name.
        dtype: data type, such as ``bfloat16``.
        shape: its dimensions.
        offset: first byte.
        checksum: sum of its bytes, taken eight at a time modulo 2**64, as a signed number.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    checksum: int


class Segment:
    """Shared memory of a fixed size, mapped into this process.

    Python's own ``SharedMemory`` does not serve: it does not reserve the memory, so that a full
    ``/dev/shm`` kills the writer by SIGBUS, and a reader that ends removes it under the others.
    """

    def __init__(self, path: Path, *, create_bytes: int = 0) -> None:
        """Map an existing segment, or with ``create_bytes`` make a new one.

        Raises:
            ValueError: there is not so much shared memory.
        """
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create_bytes else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if create_bytes:
                os.posix_fallocate(descriptor, 0, create_bytes)
            self._map = mmap.mmap(descriptor, 0)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise ValueError(
                f"no shared memory of {create_bytes:,} bytes in {path.parent}: {error.strerror}. Make it "
                "larger (Docker: --shm-size), or use smaller chunks"
            ) from error
        finally:
            os.close(descriptor)
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    @classmethod
    def create(cls, size: int) -> Segment:
        """A new segment under a name of its own; :meth:`unlink` it once the others have mapped it."""
        path = _PLACE / f"klong-{os.getpid()}-{os.urandom(6).hex()}"
        return cls(path, create_bytes=aligned(size))

    def put(self, name: str, tensor: Tensor, offset: int) -> Slot:
        """Copy a tensor in at ``offset``."""
        self.view(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), offset).copy_(tensor)
        end = offset + tensor.nbytes
        self.bytes[end : offset + aligned(tensor.nbytes)] = 0  # the checksum runs over whole words
        dtype = str(tensor.dtype).removeprefix("torch.")
        return Slot(name, dtype, tuple(tensor.shape), offset, self.checksum(offset, tensor.nbytes))

    def view(self, dtype: str, shape: tuple[int, ...], offset: int) -> Tensor:
        """The tensor at ``offset``, in shared memory."""
        kind: torch.dtype = getattr(torch, dtype)
        size = torch.Size(shape).numel() * kind.itemsize
        return self.bytes[offset : offset + size].view(kind).view(shape)

    def checksum(self, offset: int, size: int) -> int:
        """Sum of the words from ``offset``; memory bandwidth, and any single wrong byte shows."""
        return int(self.bytes[offset : offset + aligned(size)].view(torch.int64).sum())

    def unlink(self) -> None:
        """Take the name away; the memory goes when the last process unmaps it."""
        self.path.unlink(missing_ok=True)


def aligned(size: int) -> int:
    """Bytes that something of ``size`` takes in a segment."""
    return -(-size // _ALIGN) * _ALIGN
