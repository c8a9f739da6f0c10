"""What one orchestrator process can carry: turns, journal entries and sandboxes a second.

Run from the top of the repository: ``python -m benchmarks.orchestrator [--contexts 4096 32768 131072]``.

Agent, client, window rule, journal and sandboxes are the run's own. The model is not: a process on a real
socket answers every request at once with the same tool call, and says which prompt it saw, as vLLM does. So
what is left is what the orchestrator itself costs. Several processes at a time, each with tasks of its own,
show how it shards.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from megatron_klong.agent.clock import BudgetReport, TokenClock
from megatron_klong.agent.episode import Agent, AgentTask, Answer, Episode, StopReason, Turn
from megatron_klong.config import SandboxConfig, WindowConfig
from megatron_klong.data.header import MARKER_TEXT, NOTE_TEXT
from megatron_klong.factory.generate import generate_domain
from megatron_klong.inference.client import TokenClient
from megatron_klong.inference.wire import Sampling
from megatron_klong.judge.rubric import Check, NodeGrade, RubricNode
from megatron_klong.rl.live import live_rule
from megatron_klong.rollout.groups import RolloutPlan, complete_rollouts
from megatron_klong.rollout.journal import Journal, RolloutKey
from megatron_klong.rollout.runner import RolloutRunner
from megatron_klong.rollout.task import Task
from megatron_klong.sandbox.base import CommandResult, SandboxSpec
from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.trajectory.render import Control, Renderer, Text, load_renderer
from megatron_klong.trajectory.schema import Message

_VERSION = "benchmark:0"
_CALL = (
    "\n<think></think>\n<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>echo 42</arg_value>\n"
    "</tool_call>"
)
_LEAF = RubricNode(id="leaf", requirements="r", weight=1)
_ROOM = 4096
"""Tokens of the window beyond the first prompt: nothing is dropped meanwhile."""


@dataclass(frozen=True)
class Load:
    """What is played.

    Attributes:
        context: tokens of the first prompt.
        turns: of each rollout.
        sandboxes: bubblewrap's, in place of ones that answer at once.
    """

    context: int
    rollouts: int
    turns: int
    sandboxes: bool


@dataclass(frozen=True)
class Carried:
    """What came of it.

    Attributes:
        processes: orchestrators at a time.
        cpu_milliseconds: processor time of an orchestrator for each turn.
        memory_bytes: that an orchestrator has grown by, for each rollout under way.
        journal_bytes: on disk, for each rollout; the first prompt is in it once.
    """

    load: Load
    processes: int
    seconds: float
    turns_per_second: float
    rollouts_per_second: float
    cpu_milliseconds: float
    memory_bytes: float
    journal_bytes: float


@dataclass(frozen=True)
class _Used:
    """What one orchestrator has used."""

    cpu_seconds: float
    memory_bytes: int
    journal_bytes: int


class InstantSandboxes:
    """Sandboxes that answer at once."""

    async def open(self, spec: SandboxSpec) -> InstantSandboxes:
        return self

    async def run(self, command: str, timeout_seconds: float) -> CommandResult:
        return CommandResult(0, "42\n", 0.0)

    async def archive(self, target: Path) -> tuple[str, ...]:
        target.write_bytes(b"")
        return ()

    async def close(self) -> None:
        pass


class OneServer:
    """The engine without its gate."""

    def __init__(self, client: TokenClient) -> None:
        self._client = client

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, limit_seconds: float | None, session: int
    ) -> Answer:
        start = time.monotonic()
        generation = await self._client.generate(prompt_ids, sampling, _VERSION)
        return Answer(generation, time.monotonic() - start)


class Ungraded(RolloutRunner):
    """Plays, and gives everything the same grade: that is the judge's load, not the orchestrator's."""

    async def grade(self, task: Task, submission: Path) -> NodeGrade:
        return NodeGrade("leaf", 1, 1.0, "not looked at")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768, 131072])
    parser.add_argument("--rollouts", type=int, default=32, help="of each orchestrator")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/orchestrator.json"))
    arguments = parser.parse_args()
    loads = [
        *(Load(context, arguments.rollouts, arguments.turns, False) for context in arguments.contexts),
        Load(min(arguments.contexts), arguments.rollouts, arguments.turns, True),
    ]
    with tempfile.TemporaryDirectory() as temporary:
        domain = Path(temporary) / "domain"
        generate_domain(domain, count=1, seed=0, renderer="glm-4.5", inserted_texts=(MARKER_TEXT, NOTE_TEXT))
        found = [
            carry(load, processes, domain, Path(temporary) / f"{number}-{processes}")
            for number, load in enumerate(loads)
            for processes in arguments.processes
        ]
        recorded = journal_rate(Path(temporary) / "journal")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    machine = f"{platform.processor() or platform.machine()}, {multiprocessing.cpu_count()} cores"
    arguments.out.write_text(
        json.dumps(
            {"machine": machine, "found": [asdict(each) for each in found], "recorded": recorded}, indent=1
        )
    )
    print(machine)
    heads = f"{'first prompt':>12}  {'sandboxes':<10} {'processes':>9} {'turns/s':>9} {'rollouts/s':>11}"
    print(f"{heads} {'CPU ms/turn':>12} {'MB/rollout':>11} {'journal kB':>11}")
    for each in found:
        kind = "bubblewrap" if each.load.sandboxes else "none"
        print(
            f"{each.load.context:>12,}  {kind:<10} {each.processes:>9} {each.turns_per_second:>9,.1f} "
            f"{each.rollouts_per_second:>11,.1f} {each.cpu_milliseconds:>12,.1f} "
            f"{each.memory_bytes / 1e6:>11,.1f} {each.journal_bytes / 1e3:>11,.1f}"
        )
    print(f"journal: {recorded:.1f} rollouts of 70,000 tokens a second")


def journal_rate(folder: Path, rollouts: int = 200, turns: int = 100) -> float:
    """Rollouts a second that are recorded and graded, each of 70,000 tokens: a file and two rows, on disk."""
    turn = Turn(1000, "0" * 64, (1,) * 400, (-0.5,) * 400, _VERSION, ("bash",), (7,) * 300)
    messages = (Message("user", "do"), *(Message("assistant", "word " * 400),) * turns)
    episode = Episode(
        (1,) * 1000, (turn,) * turns, messages, StopReason.TIMEOUT, BudgetReport("tokens", 1, 1, 1)
    )
    journal = Journal(folder, (1,), ("read_paper",))
    start = time.monotonic()
    for number in range(rollouts):
        key = RolloutKey("train", 1, number, 0)
        journal.submission(key).write_bytes(b"")
        journal.record_played(key, 0, "t", episode)
        journal.record_grade(key, NodeGrade("leaf", 1, 1.0, "not looked at"))
    seconds = time.monotonic() - start
    journal.close()
    return rollouts / seconds


def carry(load: Load, processes: int, domain: Path, folder: Path) -> Carried:
    """Play a load by so many orchestrators at a time, each against a server of its own."""
    context = multiprocessing.get_context("spawn")
    started = []
    for number in range(processes):
        ours, theirs = context.Pipe()
        process = context.Process(target=_orchestrator, args=(theirs, load, domain, folder / str(number)))
        process.start()
        started.append((process, ours))
    for _, pipe in started:
        assert pipe.recv() == "ready"
    begin = time.monotonic()
    for _, pipe in started:
        pipe.send("go")
    used: list[_Used] = [pipe.recv() for _, pipe in started]
    seconds = time.monotonic() - begin
    for process, _ in started:
        process.join()
    rollouts = load.rollouts * processes
    turns = rollouts * load.turns
    return Carried(
        load, processes, seconds, turns / seconds, rollouts / seconds,
        1e3 * sum(each.cpu_seconds for each in used) / turns,
        sum(each.memory_bytes for each in used) / rollouts,
        sum(each.journal_bytes for each in used) / rollouts,
    )  # fmt: skip


def _orchestrator(pipe: Connection, load: Load, domain: Path, folder: Path) -> None:
    renderer = load_renderer("glm-4.5", domain / "tokenizer")
    action = list(renderer.encode([Text(_CALL), Control("<|observation|>")]))
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    server = context.Process(target=_serve, args=(theirs, action), daemon=True)
    server.start()
    port = ours.recv()
    agent = _agent(renderer, load, len(action))
    task = Task(_task(renderer, load.context), {}, (), _LEAF, {"leaf": Check(command="true")})
    plans = [
        RolloutPlan(
            RolloutKey("train", 1, number, 0), 0, task,
            # So many actions, and not one more.
            lambda: TokenClock(load.turns * len(action) - 1, 0), seed=number,
        )
        for number in range(load.rollouts)
    ]  # fmt: skip

    async def play() -> _Used:
        journal = Journal(folder, renderer.opening_ids, ("read_paper",))
        backend = Bubblewrap() if load.sandboxes else InstantSandboxes()
        limits = SandboxConfig(memory_mib=128, processes=16, disk_mib=1)
        async with TokenClient(f"http://127.0.0.1:{port}") as client:
            runner = Ungraded(agent, OneServer(client), backend, limits)  # type: ignore[arg-type]
            pipe.send("ready")
            pipe.recv()
            before, memory = time.process_time(), _peak_bytes()
            await complete_rollouts(plans, runner, journal, concurrent=load.rollouts)
            used = time.process_time() - before
            memory = _peak_bytes() - memory
        assert [each.turns for each in journal.rollouts("train", 1)] == [load.turns] * load.rollouts
        journal.close()
        return _Used(used, memory, sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()))

    pipe.send(asyncio.run(play()))
    server.terminate()


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _agent(renderer: Renderer, load: Load, action_tokens: int) -> Agent:
    config = WindowConfig(
        max_tokens=2 * load.context + _ROOM, overlap_tokens=64, reserve_generation=4 * action_tokens,
        reserve_observation=256, max_prefix_fraction=0.6,
    )  # fmt: skip
    rule, inserted = live_rule(config, renderer)
    sampling = Sampling(4 * action_tokens, stop_token_ids=renderer.stop_ids, return_prompt=True)
    return Agent(renderer, rule, inserted.marker_ids, inserted.note_ids, sampling, ("read_paper",), 10.0)


def _task(renderer: Renderer, tokens: int) -> AgentTask:
    """A task whose first prompt has about so many tokens."""
    phrase = "Measure again, and write down what you see. "
    each = len(renderer.encode([Text(phrase * 100)])) / 100
    return AgentTask("t", (Message("user", phrase * max(1, round(tokens / each))),), {})


def _serve(pipe: Connection, action: list[int]) -> None:
    """The route that agents use, on a real socket; the prompt is echoed without being parsed."""
    choice = {
        "token_ids": action, "finish_reason": "stop",
        "logprobs": {"content": [{"logprob": -0.5} for _ in action]},
        "weight_versions": [{"version": _VERSION, "start": 0, "end": len(action)}],
    }  # fmt: skip
    head = json.dumps({"choices": [choice], "usage": {"prompt_tokens_details": None}})[:-1].encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                request = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            lines = request.lower().split(b"\r\n")
            length = next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:"))
            body = await reader.readexactly(length)
            start = body.index(b"[", body.index(b'"token_ids"'))
            prompt = body[start : body.index(b"]", start) + 1]
            said = head + b', "prompt_token_ids": ' + prompt + b"}"
            writer.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(said)
            )
            writer.write(said)
            await writer.drain()

    async def run() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0, limit=1 << 24)
        pipe.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
