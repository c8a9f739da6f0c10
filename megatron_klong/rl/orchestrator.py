"""The loop of a reinforcement learning run. It owns iterations and stages; imports no torch."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import groupby

from megatron_klong.agent.episode import Agent
from megatron_klong.config import RlConfig
from megatron_klong.inference.wire import Sampling
from megatron_klong.rl.advantage import group_advantages
from megatron_klong.rl.batches import BatchHeader, batch_folder, write_batch
from megatron_klong.rl.exchange import Exchange, Finished
from megatron_klong.rl.experience import ExperienceMaker, Segment
from megatron_klong.rl.live import InsertedTokens, live_rule
from megatron_klong.rl.plans import evaluation_plans, stage_of, training_plans
from megatron_klong.rl.report import Display, RlLog
from megatron_klong.rl.serving import GatedEngine
from megatron_klong.rollout.groups import RolloutPlan, complete_rollouts
from megatron_klong.rollout.journal import Journal, RolloutRecord
from megatron_klong.rollout.runner import RolloutRunner
from megatron_klong.rollout.task import Task, read_task, task_folders
from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.trajectory.render import Renderer, load_renderer
from megatron_klong.window import ContextWindow


async def orchestrate(config: RlConfig, display: Display) -> None:
    """Roll out, hand over, wait for new weights; stage after stage. Started again, it goes on.

    Raises:
        ValueError: tasks or settings are wrong, or infrastructure failed for all rollouts.
        ContextMismatchError: an engine did not see what training uses.
    """
    run = RunDirectory(config.run.dir)
    exchange = Exchange(run.exchange)
    async with GatedEngine(exchange, config.servers) as engine:
        orchestrator = Orchestrator(config, run, engine, display)
        with display.phase("waiting for trainer and servers", None):
            start = (await engine.request_sync()).iteration
        orchestrator.log.resume(start)
        await orchestrator.evaluate_if_due(start)
        for iteration in range(start + 1, config.iterations + 1):
            if not batch_folder(run.batches, iteration).is_dir():
                await orchestrator.roll_out(iteration)
            await engine.close_gate()
            with display.phase(f"iteration {iteration}/{config.iterations}: training", None):
                done = await engine.wait_done(iteration)
            orchestrator.log.trained(iteration, done)
            await orchestrator.evaluate_if_due(iteration)
    orchestrator.close()
    # Last: a run that says so is left as it is, and one that died before its summary must go on.
    exchange.tell("finished", Finished())


class Orchestrator:
    """What the steps of the loop share."""

    def __init__(self, config: RlConfig, run: RunDirectory, engine: GatedEngine, display: Display) -> None:
        self._config = config
        self._run = run
        self._display = display
        self.log = RlLog(run, config, display)
        renderer = load_renderer(config.renderer, config.tokenizer)
        rule, inserted = live_rule(config.window, renderer)
        self._runner = RolloutRunner(
            _agent(config, renderer, rule, inserted), engine, Bubblewrap(), config.sandbox
        )
        self._journal = Journal(run.rollouts, renderer.opening_ids, config.window.reading_tools)
        self._maker = ExperienceMaker(rule, inserted)
        self._train = [read_task(folder) for folder in task_folders(config.tasks.train)]
        held_out = config.tasks.held_out
        self._held_out: list[Task] = []
        if held_out is not None:
            self._held_out = [read_task(folder) for folder in task_folders(held_out)]

    async def roll_out(self, iteration: int) -> None:
        """Complete the groups of an iteration and write its batch."""
        stage = stage_of(self._config.stages, iteration)
        start = time.monotonic()
        what = f"iteration {iteration}/{self._config.iterations}, stage {stage + 1}: rollouts"
        records = await self._complete(what, training_plans(self._config, self._train, iteration))
        dropped = self._write_batch(iteration, stage, records)
        self.log.rolled_out(iteration, stage, records, dropped, time.monotonic() - start)

    async def evaluate_if_due(self, iteration: int) -> None:
        """Grade the held-out tasks before the first iteration and after each stage."""
        stage_ends = {0, *(n for n in range(1, self._config.iterations + 1) if self._ends_stage(n))}
        if not self._held_out or iteration not in stage_ends:
            return
        start = time.monotonic()
        plans = evaluation_plans(self._config, self._held_out, iteration)
        records = await self._complete(f"iteration {iteration}: held-out tasks", plans)
        checked = len([self._segments(record, 0) for record in _graded(records)])
        self.log.evaluated(iteration, records, checked, time.monotonic() - start)

    def close(self) -> None:
        """Write the summary and close the journal."""
        self.log.summarise(self._journal)
        self._journal.close()

    def _ends_stage(self, iteration: int) -> bool:
        stages = self._config.stages
        return iteration == self._config.iterations or stage_of(stages, iteration) != stage_of(
            stages, iteration + 1
        )

    async def _complete(self, what: str, plans: Sequence[RolloutPlan]) -> list[RolloutRecord]:
        with self._display.phase(what, len(plans)) as tick:
            await complete_rollouts(
                plans, self._runner, self._journal, concurrent=self._config.rollout.concurrent, on_done=tick
            )
        first = plans[0].key
        records = self._journal.rollouts(first.purpose, first.iteration)
        if not _graded(records):
            reason = (records[0].error or "").strip().splitlines()[-1]
            # The cause is the machine's: when it is mended, the next start plays them.
            self._journal.forget_failures(first.purpose, first.iteration)
            raise ValueError(f"{what}: infrastructure failed for every rollout, the first by: {reason}")
        return records

    def _write_batch(self, iteration: int, stage: int, records: Sequence[RolloutRecord]) -> int:
        """Advantages by group, windows by rollout; the number of groups dropped for want of a baseline."""
        groups: list[str] = []
        members: list[RolloutRecord] = []
        advantages: list[float] = []
        segments: list[Segment] = []
        checked = dropped = 0
        for number, group in groupby(records, key=lambda record: record.key.group):
            rollouts = list(group)
            scores = [record.score for record in rollouts]
            if self._config.rollout.shuffle_grades:
                random.Random(f"{self._config.run.seed}/grades/{iteration}/{number}").shuffle(scores)
            given = group_advantages(scores, divide_by_std=self._config.objective.divide_by_std)
            windows = [self._segments(record, len(members) + n) for n, record in enumerate(_graded(rollouts))]
            checked += len(windows)
            if given is None:
                dropped += 1
                continue
            groups.append(f"{iteration:05d}-{number:03d}")
            segments += [segment for each in windows for segment in each]
            members += _graded(rollouts)
            advantages += given
        if not groups:
            raise ValueError(f"iteration {iteration}: no group has two graded rollouts")
        header = BatchHeader(
            iteration=iteration, stage=stage, version=members[0].version or "", groups=tuple(groups),
            rollouts=tuple(record.key.id for record in members),
            scores=tuple(record.score or 0.0 for record in members), advantages=tuple(advantages),
            checked=checked, dropped_groups=dropped,
        )  # fmt: skip
        write_batch(self._run.batches, header, segments)
        return dropped

    def _segments(self, record: RolloutRecord, number: int) -> list[Segment]:
        """The windows of a rollout; what its engine saw is compared with them."""
        return self._maker.segments(self._journal.tokens(record.key), number)


def _graded(records: Sequence[RolloutRecord]) -> list[RolloutRecord]:
    return [record for record in records if record.score is not None]


def _agent(config: RlConfig, renderer: Renderer, rule: ContextWindow, inserted: InsertedTokens) -> Agent:
    return Agent(
        renderer=renderer,
        rule=rule,
        marker_ids=inserted.marker_ids,
        note_ids=inserted.note_ids,
        sampling=Sampling(
            max_tokens=config.window.reserve_generation, temperature=config.rollout.temperature,
            stop_token_ids=renderer.stop_ids, return_prompt=True,
        ),
        reading_tools=config.window.reading_tools,
        tool_seconds=config.rollout.tool_seconds,
    )  # fmt: skip
