"""A run that is asked to end does so after the step it is in, with a checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Of Slurm and launchers, of a person, of a terminal that is closed."""


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
    """Within, signals that ask for the end are noted and do nothing else.

    What this process was started to ignore (by nohup) stays ignored.
    """
    request = StopRequest()
    caught = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request._hear) for number in caught}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(SystemExit):
    """The run was asked to end and has saved; a process that lets it pass exits with 128 + the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
