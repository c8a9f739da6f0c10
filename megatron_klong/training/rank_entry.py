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


class RankError(Exception):
    """What a rank found wrong, said in one line to the person who started it; no fault of the program."""


def run_rank(work: Callable[[Path], None]) -> NoReturn:
    """Do the work of a rank on the path that is its only argument, and exit.

    The exit code is 2 for an error of the user's (ValueError) or a :class:`RankError`, whose text is then
    the last line of the rank's log. When the launcher is gone, this process gets SIGTERM.
    """
    if "KLONG_LAUNCHER" in os.environ:
        die_with_parent(int(os.environ["KLONG_LAUNCHER"]))
    try:
        work(Path(sys.argv[1]))
    except (ValueError, RankError) as error:
        with contextlib.suppress(OSError):  # the log may be on a full disk
            traceback.print_exc()
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    sys.exit(0)
