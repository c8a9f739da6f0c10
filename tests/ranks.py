"""One pool of gloo ranks for every distributed test, whatever its layout.

Importing Megatron takes seconds on each rank, so the ranks stay; process groups are made anew for
every call, over as many of the ranks as the call's world size.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import psutil

from megatron_klong.config import ParallelConfig

CALL_SECONDS = 240
CALLS = 12
"""Calls until the ranks are started anew: gloo keeps the threads of a process group that is no more,
about fifty for each call, and all of them go on polling."""


class RankPool:
    """Processes that run a function as the ranks of a layout."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []
        self._calls = 0

    def run(
        self, function: Callable[..., Any], parallel: ParallelConfig, world_size: int, /, **arguments: Any
    ) -> list[Any]:
        """Call ``function(platform=..., **arguments)`` on ``world_size`` ranks; their results in order.

        A rank that raises fails the test with its traceback, and the pool starts anew.
        """
        if self._calls == CALLS:
            self.close()
        self._calls += 1
        self._start(world_size)
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{folder}/rendezvous"
            used = self._ranks[:world_size]
            for number, (_, pipe) in enumerate(used):
                pipe.send((function, parallel, meeting, number, world_size, arguments))
            answers = [pipe.recv() if pipe.poll(CALL_SECONDS) else ("no answer", None) for _, pipe in used]
        failures = [error for error, _ in answers if error]
        if failures:
            self.close()
            raise AssertionError(min(failures, key=lambda text: "no answer" in text or "Connection" in text))
        return [result for _, result in answers]

    def close(self) -> None:
        """End all ranks."""
        for process, pipe in self._ranks:
            pipe.close()
            # Megatron's checkpoint writers are children of the rank, and would stay.
            started = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            process.join()
            for child in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
        self._ranks, self._calls = [], 0

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        while len(self._ranks) < count:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=False)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))


def _serve(pipe: Connection) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    from megatron_klong.platform import quiet_imports

    torch.set_num_threads(1)
    quiet_imports()
    from megatron_klong.training.initialize import distributed

    while True:
        try:
            function, parallel, meeting, rank, world_size, arguments = pipe.recv()
        except EOFError:
            return
        try:
            with distributed(
                parallel, seed=1, init_method=meeting, rank=rank, world_size=world_size
            ) as platform:
                answer = (None, function(platform=platform, **arguments))
        except BaseException:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)
