"""Work of one rank that all ranks need the outcome of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Shared = TypeVar("Shared")


def on_first(work: Callable[[], Shared]) -> Shared:
    """Do it on the first rank; all ranks get its result, or its error.

    Raises:
        OSError: what the first rank could not do.
    """
    shared: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            shared[0] = work()
        except OSError as error:
            shared[1] = str(error)
    torch.distributed.broadcast_object_list(shared, 0)
    if shared[1] is not None:
        raise OSError(shared[1])
    result: Shared = shared[0]
    return result
