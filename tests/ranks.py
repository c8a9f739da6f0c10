"""Gloo ranks for every distributed test, whatever its layout.

Importing Megatron takes seconds, so one process imports it, once, and the ranks of a call are forks of
it. No rank outlives its call: gloo keeps the threads of a process group that is no more, and they poll.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import psutil

from megatron_klong.config import ParallelConfig

CALL_SECONDS = 240


class RankPool:
    """Runs a function as the ranks of a layout."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        # With what the tests import themselves (transformers, say), or every rank would import it.
        users = [name for name, module in sys.modules.items() if "RankPool" in vars(module)]
        self._context.set_forkserver_preload(["tests.ranks_preload", *users])

    def run(
        self, function: Callable[..., Any], parallel: ParallelConfig, world_size: int, /, **arguments: Any
    ) -> list[Any]:
        """Call ``function(platform=..., **arguments)`` on ``world_size`` ranks; their results in order.

        A rank that raises fails the test with its traceback.
        """
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as ranks:
            meeting = f"file://{folder}/rendezvous"
            pipes = []
            for number in range(world_size):
                ours, theirs = self._context.Pipe()
                call = (function, parallel, meeting, number, world_size, arguments)
                process = self._context.Process(target=_serve, args=(theirs, call))
                process.start()
                ranks.callback(_end, process)
                theirs.close()
                pipes.append(ours)
            answers = [_answer(pipe) for pipe in pipes]
        failures = [error for error, _ in answers if error]
        if failures:
            raise AssertionError(min(failures, key=lambda text: "no answer" in text or "Connection" in text))
        return [result for _, result in answers]


def _answer(pipe: Connection) -> tuple[str | None, Any]:
    try:
        return pipe.recv() if pipe.poll(CALL_SECONDS) else ("no answer", None)
    except EOFError:
        return ("no answer: the rank's process ended", None)


def _end(process: BaseProcess) -> None:
    started = []
    with contextlib.suppress(psutil.NoSuchProcess):
        # Megatron's checkpoint writers are children of the rank, and would stay.
        started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.join()
    for child in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def _serve(pipe: Connection, call: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # the modules of all tests, which no collection need look at
    from megatron_klong.training.initialize import distributed

    function, parallel, meeting, rank, world_size, arguments = call
    try:
        with distributed(parallel, seed=1, init_method=meeting, rank=rank, world_size=world_size) as platform:
            answer = (None, function(platform=platform, **arguments))
    except BaseException:
        answer = (traceback.format_exc(), None)
    pipe.send(answer)
    pipe.recv()  # until the pool ends this rank: at its own exit it would wait for the writers
