"""How a rank's process begins and ends: the other side of :mod:`megatron_klong.training.local_ranks`."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from megatron_klong.platform.lifetime import die_with_parent

REPORT_TO = "KLONG_REPORT_TO"
"""Names the file descriptor on which the launcher hears why a rank ends."""

MOST_REPORTED = 1 << 15
"""Bytes; half of what an empty pipe takes at once."""


class RankError(Exception):
    """What a rank found wrong, said in one line to the person who started it; no fault of the program."""


def run_rank(work: Callable[[Path], None]) -> NoReturn:
    """Do the work of a rank on the path that is its only argument, and exit.

    The exit code is 2 for an error of the user's (ValueError) or a :class:`RankError`, whose text is then
    reported. When the launcher is gone, this process gets SIGTERM.
    """
    if "KLONG_LAUNCHER" in os.environ:
        die_with_parent(int(os.environ["KLONG_LAUNCHER"]))
    try:
        work(Path(sys.argv[1]))
    except (ValueError, RankError) as error:
        with contextlib.suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
        report_error(str(error))
        sys.exit(2)
    sys.exit(0)


def report_error(error: str) -> None:
    """Say why this rank ends: as the last line of its log, and to the launcher, where there is one."""
    line = f"error: {error}"
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    if REPORT_TO in os.environ:
        with contextlib.suppress(OSError):
            os.write(int(os.environ[REPORT_TO]), line.encode()[:MOST_REPORTED])
