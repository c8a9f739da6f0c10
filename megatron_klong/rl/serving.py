"""The orchestrator's way to the servers: one gate, any number of servers, and recovery when one fails."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from types import TracebackType

from megatron_klong.agent.episode import Answer, OutOfTimeError
from megatron_klong.inference.client import TokenClient
from megatron_klong.inference.gate import Gate
from megatron_klong.inference.wire import RefusedError, Sampling, ServerError
from megatron_klong.rl.exchange import Done, Exchange, Served, SyncRequest

_POLL_SECONDS = 0.1


class GatedEngine:
    """Generates by the servers behind the gate. A request that a failing server lost is sent again.

    After a failure the gate closes, the trainer is asked for a sync, and the gate opens when all servers
    serve its weights again.
    """

    def __init__(self, exchange: Exchange, servers: int) -> None:
        self._exchange = exchange
        self._servers = servers
        self._gate = Gate()
        self._clients: tuple[TokenClient, ...] = ()
        self._open_clients = AsyncExitStack()
        self._recovery: asyncio.Task[None] | None = None

    async def __aenter__(self) -> GatedEngine:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._recovery is not None:
            self._recovery.cancel()
        await self._open_clients.aclose()

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, limit_seconds: float | None, session: int
    ) -> Answer:
        """See :class:`megatron_klong.agent.episode.Engine`; time before the gate is not charged."""

        async def ask(version: str) -> Answer:
            client = self._clients[session % len(self._clients)]
            start = time.monotonic()
            try:
                async with asyncio.timeout(limit_seconds):
                    generation = await client.generate(prompt_ids, sampling, version)
            except TimeoutError:
                raise OutOfTimeError from None
            if generation.finish_reason == "abort":
                raise ServerError(f"{client.url}: a request was aborted")
            return Answer(generation, time.monotonic() - start)

        while True:
            try:
                return await self._gate.run(ask)
            except RefusedError:
                raise
            except ServerError as error:
                await self._recover(error)

    async def close_gate(self) -> None:
        """Let nothing through until the next weights are served."""
        await self._gate.close(abort=False)

    async def open_for(self, served: Served) -> None:
        """The servers have these weights: let requests through."""
        urls = tuple(server.url for server in self._exchange.servers(self._servers))
        if tuple(client.url for client in self._clients) != urls:
            await self._open_clients.aclose()
            opened = [await self._open_clients.enter_async_context(TokenClient(url)) for url in urls]
            self._clients = tuple(opened)
        self._gate.open(served.version)

    async def request_sync(self) -> Served:
        """Ask the trainer for a sync of its present weights, and open the gate when it is done."""
        number = self._exchange.last_request() + 1
        self._exchange.tell(f"request-{number}", SyncRequest(number=number))
        while (served := self._exchange.heard(f"served-{number}", Served)) is None:
            await asyncio.sleep(_POLL_SECONDS)
        await self.open_for(served)
        return served

    async def wait_done(self, iteration: int) -> Done:
        """Wait until a batch is trained on and its weights are served; then open the gate."""
        while (done := self._exchange.heard(f"done-{iteration}", Done)) is None:
            await asyncio.sleep(_POLL_SECONDS)
        await self.open_for(done.served)
        return done

    async def _recover(self, error: ServerError) -> None:
        """Once for all requests that failed together."""
        if self._recovery is None or self._recovery.done():
            print(f"orchestrator: {error}; asking for a sync", file=sys.stderr, flush=True)
            self._recovery = asyncio.create_task(self._sync_again())
        await asyncio.shield(self._recovery)

    async def _sync_again(self) -> None:
        await self._gate.close(abort=True)
        await self.request_sync()
