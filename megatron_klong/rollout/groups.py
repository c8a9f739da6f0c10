"""Many rollouts at a time: what the journal has is kept, what is missing is played."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_klong.agent.clock import BudgetClock
from megatron_klong.rollout.journal import Journal, RolloutKey, RolloutState
from megatron_klong.rollout.runner import RolloutRunner
from megatron_klong.rollout.task import Task
from megatron_klong.sandbox.base import SandboxError

_TRIES = 3


@dataclass(frozen=True)
class RolloutPlan:
    """A rollout that is wanted.

    Attributes:
        stage: in which its group was started.
        clock: makes its budget clock.
        seed: of its sampling.
    """

    key: RolloutKey
    stage: int
    task: Task
    clock: Callable[[], BudgetClock]
    seed: int


async def complete_rollouts(
    plans: Sequence[RolloutPlan],
    runner: RolloutRunner,
    journal: Journal,
    *,
    concurrent: int,
    on_done: Callable[[], None] = lambda: None,
) -> None:
    """Bring all rollouts to the journal, graded or failed.

    Args:
        concurrent: sandboxes of agents at one time.
        on_done: called after each rollout, those found in the journal included.

    Raises:
        ValueError, ServerError: the first one that a rollout met; the others are ended.
    """
    slots = asyncio.Semaphore(concurrent)

    async def one(plan: RolloutPlan) -> None:
        async with slots:
            await _complete(plan, runner, journal)
        on_done()

    try:
        async with asyncio.TaskGroup() as tasks:
            for plan in plans:
                tasks.create_task(one(plan))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from failures


async def _complete(plan: RolloutPlan, runner: RolloutRunner, journal: Journal) -> None:
    key, found = plan.key, journal.find(plan.key)
    if found is not None and found.task_id != plan.task.agent.id:
        raise ValueError(
            f"journal: {key.id} is a rollout of task {found.task_id!r}, and {plan.task.agent.id!r} is "
            "wanted; the tasks have changed since the run was started"
        )
    if found is not None and found.state in (RolloutState.GRADED, RolloutState.FAILED):
        return
    for attempt in range(1, _TRIES + 1):
        try:
            if found is None:
                episode = await runner.play(plan.task, plan.clock(), plan.seed, journal.submission(key))
                journal.record_played(key, plan.stage, plan.task.agent.id, episode)
                found = journal.find(key)
            journal.record_grade(key, await runner.grade(plan.task, journal.submission(key)))
            return
        except SandboxError:
            if attempt == _TRIES:
                journal.record_failure(key, plan.stage, plan.task.agent.id, traceback.format_exc())
