"""Which rollouts an iteration wants: drawn from the seed, so the same after a restart. Imports no torch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import partial

from megatron_klong.agent.clock import BudgetClock, TokenClock, WallClock
from megatron_klong.config import RlConfig, StageConfig
from megatron_klong.rollout.groups import RolloutPlan
from megatron_klong.rollout.journal import RolloutKey
from megatron_klong.rollout.task import Task


def stage_of(stages: Sequence[StageConfig], iteration: int) -> int:
    """The number, from 0, of the stage that an iteration (from 1) belongs to."""
    last = 0
    for number, stage in enumerate(stages):
        last += stage.iterations
        if iteration <= last:
            return number
    raise AssertionError(f"iteration {iteration} is after the last stage")


def training_plans(config: RlConfig, tasks: Sequence[Task], iteration: int) -> list[RolloutPlan]:
    """The groups of an iteration: each task of the folder once before any comes again, in seeded orders."""
    stage = stage_of(config.stages, iteration)
    clock = partial(make_clock, config, config.stages[stage].limit)
    plans = []
    for group in range(config.rollout.groups):
        task = tasks[_drawn(config.run.seed, len(tasks), (iteration - 1) * config.rollout.groups + group)]
        for member in range(config.rollout.group_size):
            key = RolloutKey("train", iteration, group, member)
            plans.append(RolloutPlan(key, stage, task, clock, rollout_seed(config.run.seed, key)))
    return plans


def evaluation_plans(config: RlConfig, tasks: Sequence[Task], iteration: int) -> list[RolloutPlan]:
    """All held-out tasks, under the weights after an iteration; the same seeds every time."""
    limit = config.evaluation.limit or config.stages[-1].limit
    stage = stage_of(config.stages, max(1, iteration))
    clock = partial(make_clock, config, limit)
    plans = []
    for group, task in enumerate(tasks):
        for member in range(config.evaluation.rollouts):
            key = RolloutKey("evaluation", iteration, group, member)
            seed = rollout_seed(config.run.seed, RolloutKey("evaluation", 0, group, member))
            plans.append(RolloutPlan(key, stage, task, clock, seed))
    return plans


def make_clock(config: RlConfig, limit: float) -> BudgetClock:
    """A fresh budget clock."""
    if config.rollout.clock == "wall":
        return WallClock(limit)
    return TokenClock(limit, config.rollout.tokens_per_call)


def rollout_seed(seed: int, key: RolloutKey) -> int:
    """Where the sampling seeds of a rollout begin; a turn takes the next."""
    return random.Random(f"{seed}/{key.id}").randrange(1 << 30)


def _drawn(seed: int, tasks: int, position: int) -> int:
    """The task at a position of an endless sequence of shuffles of all tasks."""
    turn, place = divmod(position, tasks)
    order = list(range(tasks))
    random.Random(f"{seed}/tasks/{turn}").shuffle(order)
    return order[place]
