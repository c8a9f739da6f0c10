"""A run that is asked to end does so after the step it is in, with a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

from megatron_klong.platform.lifetime import on_stop_signals


class StopRequest:
    """Whether a signal has come, to any rank."""

    def __init__(self) -> None:
        self._signal = 0

    def heard(self, device: torch.device) -> int:
        """The signal's number, on all ranks alike once any of them has it; 0 before. Collective."""
        number = torch.tensor(self._signal, device=device)
        torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
        return int(number)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        self._signal = number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within, signals that ask for the end are noted and do nothing else."""
    request = StopRequest()
    with on_stop_signals(request._hear):
        yield request


class Stopped(SystemExit):
    """The run was asked to end and has saved; a process that lets it pass exits with 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
