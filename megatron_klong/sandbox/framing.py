"""Frames between the host and the process inside a sandbox; both import this file. Standard library only."""

import json
import struct

LENGTH = struct.Struct(">I")
CHUNK = 1 << 20


def frame(data: bytes) -> bytes:
    """Bytes with their length before them; an empty frame ends a sequence of chunks."""
    return LENGTH.pack(len(data)) + data


def header(fields: dict[str, object]) -> bytes:
    """A frame of JSON."""
    return frame(json.dumps(fields).encode())
