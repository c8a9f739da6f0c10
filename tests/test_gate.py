"""The gate: nobody is inside while weights change, and nobody is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from megatron_klong.inference.gate import Gate


class Requests:
    """Requests that end when told to, and what became of them."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.begun: list[tuple[int, str]] = []
        self.inside = 0

    def request(self, number: int) -> Callable[[str], Awaitable[str]]:
        async def send(version: str) -> str:
            self.begun.append((number, version))
            self.inside += 1
            try:
                await self.end.wait()
            finally:
                self.inside -= 1
            return f"{number} by {version}"

        return send


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_closed_gate_admits_nobody_and_an_open_one_says_the_version() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        asked = asyncio.create_task(gate.run(requests.request(1)))
        await settle()
        assert not gate.is_open and requests.begun == []
        gate.open("w1")
        requests.end.set()
        assert await asked == "1 by w1"

    asyncio.run(run())


def test_closing_waits_for_what_is_under_way() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        gate.open("w1")
        first = asyncio.create_task(gate.run(requests.request(1)))
        await settle()
        closing = asyncio.create_task(gate.close(abort=False))
        later = asyncio.create_task(gate.run(requests.request(2)))
        await settle()
        assert not closing.done() and requests.begun == [(1, "w1")]
        requests.end.set()
        await closing
        assert requests.inside == 0 and await first == "1 by w1"
        await settle()
        assert requests.begun == [(1, "w1")]
        gate.open("w2")
        assert await later == "2 by w2"

    asyncio.run(run())


def test_aborted_requests_are_sent_again_under_the_next_version() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        gate.open("w1")
        asked = [asyncio.create_task(gate.run(requests.request(number))) for number in range(3)]
        await settle()
        assert requests.inside == 3
        await asyncio.wait_for(gate.close(abort=True), 1)
        assert requests.inside == 0 and not any(task.done() for task in asked)
        gate.open("w2")
        requests.end.set()
        assert await asyncio.gather(*asked) == ["0 by w2", "1 by w2", "2 by w2"]
        assert sorted(requests.begun) == [(n, version) for n in range(3) for version in ("w1", "w2")]

    asyncio.run(run())


def test_a_caller_who_gives_up_ends_the_request_and_an_error_reaches_its_caller() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        gate.open("w1")
        asked = asyncio.create_task(gate.run(requests.request(1)))
        await settle()
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        await settle()
        assert requests.inside == 0

        async def fail(_version: str) -> str:
            raise ConnectionError("gone")

        with pytest.raises(ConnectionError, match="gone"):
            await gate.run(fail)
        await asyncio.wait_for(gate.close(abort=False), 1)  # nobody is inside

    asyncio.run(run())


def test_a_caller_who_gives_up_while_the_gate_is_closing_is_not_sent_again() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        gate.open("w1")
        asked = asyncio.create_task(gate.run(requests.request(1)))
        await settle()
        closing = asyncio.create_task(gate.close(abort=True))
        asked.cancel()
        await asyncio.wait_for(closing, 1)
        gate.open("w2")
        requests.end.set()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(asked, 1)

    asyncio.run(run())


def test_nobody_slips_through_a_gate_that_was_open_for_a_moment() -> None:
    async def run() -> None:
        gate, requests = Gate(), Requests()
        asked = asyncio.create_task(gate.run(requests.request(1)))
        await settle()
        gate.open("w1")
        await gate.close(abort=False)  # before the waiting one has woken
        await settle()
        assert requests.begun == []
        gate.open("w2")
        requests.end.set()
        assert await asked == "1 by w2"

    asyncio.run(run())
