"""Lines at the end of a file of the run directory, on a disk that may be full."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_klong.training.rank_entry import RankError


def append_line(file: Path, line: str) -> None:
    """Add it; a reader sees all of it or knows by the missing line end that it is cut.

    Raises:
        OSError: it could not be written, or only a part.
    """
    text = (line + "\n").encode()
    with file.open("ab", buffering=0) as stream:  # nothing is left for `close` to fail on
        if stream.write(text) != len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


@contextmanager
def told_in_one_line(what: object) -> Iterator[None]:
    """What goes wrong with a file of the run, or a checkpoint, as one line for the user."""
    try:
        yield
    except OSError as error:
        raise RankError(
            f"{what} could not be written: {error}. Mend that (make room on a full disk) and start again to "
            "go on from the last checkpoint"
        ) from error
