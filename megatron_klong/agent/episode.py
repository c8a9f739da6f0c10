"""One episode of an agent: generate an action, carry out its calls, observe, until its end or its time's."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Protocol

import numpy as np

from megatron_klong.agent.clock import BudgetClock, BudgetReport
from megatron_klong.agent.context import LiveContext
from megatron_klong.agent.tools import Workplace, describe_tools, use_tool
from megatron_klong.inference.wire import Generation, Sampling
from megatron_klong.sandbox.base import Sandbox, SandboxError
from megatron_klong.trajectory.render import Renderer
from megatron_klong.trajectory.schema import Message
from megatron_klong.window import ContextWindow

MESSAGE_WITHOUT_CALL = "Go on by calling a tool; call submit when the work is done."


class StopReason(StrEnum):
    """Why an episode ended."""

    SUBMITTED = "submitted"
    TIMEOUT = "timeout"
    SANDBOX_LOST = "sandbox_lost"
    """A command ended the sandbox, and all work with it."""


class OutOfTimeError(Exception):
    """An engine did not answer within the time that was left."""


@dataclass(frozen=True)
class Answer:
    """What an engine generated, and how long that took; waits for other reasons are left out."""

    generation: Generation
    seconds: float


class Engine(Protocol):
    """Generates actions."""

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, limit_seconds: float | None, session: int
    ) -> Answer:
        """Sample an action.

        Args:
            session: one number for all requests of an episode; they go to the same server, which has most
                of each prompt in its cache.

        Raises:
            OutOfTimeError: it took longer than ``limit_seconds``.
        """
        ...


@dataclass(frozen=True)
class AgentTask:
    """What an agent is asked to do.

    Attributes:
        messages: before its first action.
        sections: the paper, by name of section.
    """

    id: str
    messages: tuple[Message, ...]
    sections: Mapping[str, str]


@dataclass(frozen=True)
class Turn:
    """One turn, as it happened.

    Attributes:
        prompt_tokens, prompt_sha256: of the prompt that the engine says it saw (see :func:`prompt_hash`).
        action_ids: as sampled, the stop id included.
        log_probs: of each, under the distribution it was sampled from.
        version: of the weights that sampled them.
        tools: names of the tools it called; empty where it called none, or none that could be read.
        answer_ids: the answer block as it stands in contexts; empty after the last turn.
    """

    prompt_tokens: int
    prompt_sha256: str
    action_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    version: str
    tools: tuple[str, ...]
    answer_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Episode:
    """A whole episode.

    Attributes:
        initial_ids: the messages before the first action.
        messages: the conversation, for people and for training on it as data.
        budget: what it used.
    """

    initial_ids: tuple[int, ...]
    turns: tuple[Turn, ...]
    messages: tuple[Message, ...]
    stop: StopReason
    budget: BudgetReport


@dataclass(frozen=True)
class Agent:
    """How every episode of a run is played.

    Attributes:
        renderer: messages to tokens, as for training data.
        rule: the window rule, as for training data.
        marker_ids, note_ids: what stands where turns are omitted, and where a block was cut.
        sampling: of actions; its ``max_tokens`` is the rule's G.
        reading_tools: tools whose calls make a turn a reading turn.
        tool_seconds: the most that one call may take.
    """

    renderer: Renderer
    rule: ContextWindow
    marker_ids: tuple[int, ...]
    note_ids: tuple[int, ...]
    sampling: Sampling
    reading_tools: tuple[str, ...]
    tool_seconds: float

    async def play(
        self, task: AgentTask, engine: Engine, sandbox: Sandbox, clock: BudgetClock, seed: int
    ) -> Episode:
        """Play an episode to its end.

        Raises:
            ServerError: the engine failed.
            ValueError: the task's messages do not fit in the window's prefix.
        """
        tools = describe_tools()
        initial = self.renderer.initial_ids(task.messages, tools)
        context = LiveContext(
            self.rule, initial_ids=initial, opening_ids=self.renderer.opening_ids,
            marker_ids=self.marker_ids, note_ids=self.note_ids,
        )  # fmt: skip
        turns: list[Turn] = []
        messages = list(task.messages)
        stop: StopReason | None = None
        while stop is None:
            sampling = replace(self.sampling, seed=seed + len(turns))
            try:
                answer = await engine.generate(context.prompt(), sampling, clock.seconds_left(), seed)
            except OutOfTimeError:
                clock.generated(0, clock.seconds_left() or 0.0)
                stop = StopReason.TIMEOUT
                break
            generation = answer.generation
            clock.generated(len(generation.token_ids), answer.seconds)
            parsed = self.renderer.parse_action(generation.token_ids, tools)
            messages.append(replace(parsed.message, cut=generation.finish_reason == "length"))
            calls = parsed.message.tool_calls
            turn = _turn(generation, tuple(call.name for call in calls))
            answers: list[Message] = []
            if clock.expired:
                stop = StopReason.TIMEOUT
            else:
                answers, stop = await self._answer(parsed.problem, messages[-1], task, sandbox, clock)
            messages += answers
            if stop is None:
                block = self.renderer.answer_ids(answers, generation.token_ids)
                reading = bool(calls) and set(turn.tools) <= set(self.reading_tools)
                turn = replace(turn, answer_ids=context.advance(generation.token_ids, block, reading=reading))
            turns.append(turn)
        return Episode(initial, tuple(turns), tuple(messages), stop, clock.report())

    async def _answer(
        self, problem: str | None, action: Message, task: AgentTask, sandbox: Sandbox, clock: BudgetClock
    ) -> tuple[list[Message], StopReason | None]:
        """What the environment says to an action, and whether that was the last one."""
        if problem is not None:
            return [Message("user", f"Your message could not be read: {problem}.")], None
        if not action.tool_calls:
            return [Message("user", MESSAGE_WITHOUT_CALL)], None
        answers: list[Message] = []
        for call in action.tool_calls:
            left = clock.seconds_left()
            seconds = self.tool_seconds if left is None else min(left, self.tool_seconds)
            start = time.monotonic()
            try:
                seen = await use_tool(call, Workplace(sandbox, task.sections, seconds))
            except SandboxError as error:
                # It worked until this call: what the agent did is its own, and is graded.
                answers.append(Message("tool", f"The sandbox is lost: {error}"))
                return answers, StopReason.SANDBOX_LOST
            clock.used_tool(time.monotonic() - start)
            answers.append(Message("tool", seen.text))
            if seen.submitted:
                return answers, StopReason.SUBMITTED
            if clock.expired:
                return answers, StopReason.TIMEOUT
        return answers, None


def _turn(generation: Generation, tools: tuple[str, ...]) -> Turn:
    seen = generation.prompt_ids
    assert seen is not None, "the engine must say which prompt it saw"
    (version,) = {span.version for span in generation.versions}
    return Turn(
        prompt_tokens=len(seen),
        prompt_sha256=prompt_hash(seen),
        action_ids=generation.token_ids,
        log_probs=generation.log_probs,
        version=version,
        tools=tools,
    )


def prompt_hash(ids: Sequence[int]) -> str:
    """SHA-256 of token ids, as little-endian 32-bit integers."""
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()
