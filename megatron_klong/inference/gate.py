"""The gate before the servers: no request is under way while weights change. Imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

Answer = TypeVar("Answer")


class Gate:
    """Lets requests through while open, all of them at one weight version. Closed at first.

    Worked example: ``answer = await gate.run(lambda version: client.generate(prompt, how, version))``
    """

    def __init__(self) -> None:
        self._open = asyncio.Event()
        self._version = ""
        self._under_way: set[asyncio.Task[object]] = set()

    @property
    def is_open(self) -> bool:
        """Whether requests are let through."""
        return self._open.is_set()

    async def run(self, request: Callable[[str], Awaitable[Answer]]) -> Answer:
        """Send a request once the gate is open; one that :meth:`close` aborted is sent again.

        Args:
            request: called with the version that is being served.
        """
        while True:
            while not self._open.is_set():  # it may have been closed again before we woke
                await self._open.wait()
            task = asyncio.ensure_future(request(self._version))
            self._under_way.add(task)
            try:
                # Shielded, so that a cancelled task is told apart from our own caller's cancellation.
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                if not task.cancelled():  # it is our caller who gives up
                    task.cancel()
                    raise
                if self._open.is_set():
                    raise
            finally:
                self._under_way.discard(task)

    async def close(self, *, abort: bool) -> None:
        """Let nobody in, and wait until nobody is inside.

        Args:
            abort: cancel what is under way (it is sent again when the gate opens) instead of
                waiting for its end.
        """
        self._open.clear()
        while self._under_way:
            if abort:
                for task in self._under_way:
                    task.cancel()
            await asyncio.wait(set(self._under_way))
            await asyncio.sleep(0)  # let run() take its task out

    def open(self, version: str) -> None:
        """Let requests through again; the servers now serve ``version``."""
        self._version = version
        self._open.set()
