"""Whether all ranks see one and the same folder."""

from __future__ import annotations

import secrets
import time
from contextlib import suppress
from pathlib import Path

import torch

from megatron_klong.training.first_rank import on_first
from megatron_klong.training.rank_entry import RankError

_SEEN_SECONDS = 60.0
"""Network file systems remember for some seconds that a file was not there."""

_POLL_SECONDS = 0.2


def check_shared(folder: Path, seconds: float = _SEEN_SECONDS) -> None:
    """Refuse a run directory that some ranks see another one of, before it takes an epoch to notice.

    Raises:
        RankError: names ranks that do not see what the first one writes.
    """
    token = folder / ".token"

    def write() -> str:
        content = secrets.token_hex(8)
        token.write_text(content)
        return content

    try:
        content = on_first(write)
    except OSError as error:
        raise RankError(f"run.dir={folder} cannot be written: {error}") from error
    blind: list[int | None] = [None] * torch.distributed.get_world_size()
    mine = None if _sees(token, content, seconds) else torch.distributed.get_rank()
    torch.distributed.all_gather_object(blind, mine)
    if ranks := [str(rank) for rank in blind if rank is not None]:
        raise RankError(
            f"run.dir={folder}: what rank 0 writes there is not seen by rank {', '.join(ranks)}; it must be "
            "on a file system that all machines of the run share"
        )


def _sees(token: Path, content: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while True:
        with suppress(OSError):
            if token.read_text() == content:
                return True
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
