"""One rollout: a task played in a fresh sandbox, and its work graded in another."""

from __future__ import annotations

import asyncio
import tarfile
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_klong.agent.clock import BudgetClock
from megatron_klong.agent.episode import Agent, Engine, Episode, StopReason
from megatron_klong.config.sandbox import SandboxConfig
from megatron_klong.judge.execute import grade_submission
from megatron_klong.judge.rubric import NodeGrade
from megatron_klong.rollout.task import Task
from megatron_klong.sandbox.base import SandboxBackend, SandboxError, SandboxSpec

_TRIES = 3
_FIRST_WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class RolloutRunner:
    """Plays tasks and grades the work.

    Attributes:
        limits: of the agent's sandbox and of the judge's.
    """

    agent: Agent
    engine: Engine
    backend: SandboxBackend
    limits: SandboxConfig

    async def play(self, task: Task, clock: BudgetClock, seed: int, submission: Path) -> Episode:
        """Play an episode and keep what it leaves in the working folder.

        Args:
            submission: tar file to write; it has its name only when complete.

        Raises:
            SandboxError: no sandbox could be opened.
            ServerError: a server failed.
        """
        spec = SandboxSpec(self.limits, task.read_only, task.path)
        sandbox = await self.backend.open(spec)
        try:
            episode = await self.agent.play(task.agent, self.engine, sandbox, clock, seed)
            unfinished = submission.with_name(f".{submission.name}.unfinished")
            try:
                await sandbox.archive(unfinished)
            except SandboxError:
                # It was opened and worked; that it is gone is the work of its commands. Nothing is left.
                episode = replace(episode, stop=StopReason.SANDBOX_LOST)
                tarfile.open(unfinished, "w").close()
            unfinished.replace(submission)
        finally:
            await sandbox.close()
        return episode

    async def grade(self, task: Task, submission: Path) -> NodeGrade:
        """Grade a kept submission; tried again where the judge's sandbox fails.

        Raises:
            SandboxError: it failed every time.
        """
        spec = SandboxSpec(self.limits)
        for attempt in range(1, _TRIES):
            try:
                return await grade_submission(submission, task.rubric, task.checks, self.backend, spec)
            except SandboxError:
                await asyncio.sleep(_FIRST_WAIT_SECONDS * 2**attempt)
        return await grade_submission(submission, task.rubric, task.checks, self.backend, spec)
