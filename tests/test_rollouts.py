"""The journal: what was played is on disk, what is on disk is never played again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from megatron_klong.agent.clock import BudgetReport, TokenClock
from megatron_klong.agent.episode import AgentTask, Episode, StopReason, Turn
from megatron_klong.judge.rubric import Check, NodeGrade, RubricNode
from megatron_klong.rollout.groups import RolloutPlan, complete_rollouts
from megatron_klong.rollout.journal import Journal, RolloutKey, RolloutState
from megatron_klong.rollout.runner import RolloutRunner
from megatron_klong.rollout.task import Task
from megatron_klong.sandbox.base import SandboxError
from megatron_klong.trajectory.schema import Message

LEAF = RubricNode(id="leaf", requirements="r", weight=1)
TASK = Task(AgentTask("t", (Message("user", "do"),), {}), {}, (), LEAF, {"leaf": Check(command="true")})


def turn(number: int, tools: tuple[str, ...] = ("bash",)) -> Turn:
    return Turn(
        prompt_tokens=10 + number, prompt_sha256=f"{number:064x}", action_ids=(number, number + 1),
        log_probs=(-0.5 * number, -1.0), version="v:3", tools=tools, answer_ids=(7,) * number,
    )  # fmt: skip


EPISODE = Episode(
    initial_ids=(1, 2, 3),
    turns=(turn(1, ("read_paper",)), turn(2), turn(3, ())),
    messages=(Message("user", "do"), Message("assistant", "done")),
    stop=StopReason.SUBMITTED,
    budget=BudgetReport("tokens", 100, 6, 2),
)
GRADE = NodeGrade("leaf", 1, 0.75, "exit code 0")


def key(member: int = 0) -> RolloutKey:
    return RolloutKey("train", 3, 1, member)


def opened(folder: Path) -> Journal:
    return Journal(folder, opening_ids=(99,), reading_tools=("read_paper",))


def play(journal: Journal, member: int = 0) -> None:
    journal.submission(key(member)).write_bytes(b"tar")
    journal.record_played(key(member), 0, "t", EPISODE)


def test_a_rollout_is_found_again_with_all_that_was_known(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    assert journal.find(key()) is None
    play(journal)
    found = journal.find(key())
    assert found is not None and found.state is RolloutState.PLAYED and found.score is None
    journal.record_grade(key(), GRADE)
    play(journal, member=1)
    journal.record_failure(key(2), 0, "t", "the sandbox broke")
    journal.close()

    again = opened(tmp_path)
    first, second, third = again.rollouts("train", 3)
    assert (first.state, first.score, first.stop) == (RolloutState.GRADED, 0.75, StopReason.SUBMITTED)
    assert (first.version, first.turns, first.generated_tokens) == ("v:3", 3, 6)
    assert first.budget == EPISODE.budget
    assert second.state is RolloutState.PLAYED
    assert (third.state, third.error) == (RolloutState.FAILED, "the sandbox broke")
    assert again.rollouts("evaluation", 3) == [] and again.rollouts("train", 2) == []
    tokens = again.tokens(key())
    assert tokens.tokens.tolist() == [1, 2, 3, 99, 1, 2, 7, 99, 2, 3, 7, 7, 99, 3, 4, 7, 7, 7]
    assert tokens.bounds.tolist() == [0, 3, 6, 7, 10, 12, 15, 18]
    assert tokens.log_probs.tolist() == [-0.5, -1.0, -1.0, -1.0, -1.5, -1.0]
    assert tokens.reading.tolist() == [True, False, False]
    assert tokens.prompt_tokens.tolist() == [11, 12, 13]
    assert tokens.prompt_sha256.tolist() == [f"{number:064x}" for number in (1, 2, 3)]


def test_failures_are_forgotten_and_nothing_else(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    play(journal)
    journal.record_grade(key(), GRADE)
    play(journal, member=1)
    journal.record_failure(key(2), 0, "t", "the sandbox broke")
    other = RolloutKey("train", 4, 1, 2)
    journal.record_failure(other, 0, "t", "the sandbox broke")
    journal.forget_failures("train", 3)
    assert [each.key.member for each in journal.rollouts("train", 3)] == [0, 1]
    assert journal.find(other) is not None


def _record_and_die(folder: Path) -> None:
    journal = opened(folder)
    for member in range(100):
        play(journal, member)
        if member % 2 == 0:
            journal.record_grade(key(member), GRADE)
        if member == 7:
            os.kill(os.getpid(), signal.SIGKILL)


def test_what_was_recorded_survives_a_kill(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=_record_and_die, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    found = opened(tmp_path).rollouts("train", 3)
    assert [record.key.member for record in found] == list(range(8))
    assert [record.state for record in found] == [RolloutState.GRADED, RolloutState.PLAYED] * 4


class Runner(RolloutRunner):
    """Plays and grades nothing, and fails as told."""

    def __init__(self, play_failures: int = 0, grade_failures: int = 0) -> None:
        object.__setattr__(self, "left", {"play": play_failures, "grade": grade_failures})
        object.__setattr__(self, "calls", {"play": 0, "grade": 0})
        object.__setattr__(self, "at_once", [0, 0])

    left: dict[str, int]
    calls: dict[str, int]
    at_once: list[int]

    async def play(self, task: Task, clock: object, seed: int, submission: Path) -> Episode:
        self.at_once[0] += 1
        self.at_once[1] = max(self.at_once)
        await asyncio.sleep(0.001)
        self.at_once[0] -= 1
        self._try("play")
        submission.write_bytes(b"tar")
        return EPISODE

    async def grade(self, task: Task, submission: Path) -> NodeGrade:
        self._try("grade")
        return GRADE

    def _try(self, what: str) -> None:
        self.calls[what] += 1
        if self.left[what]:
            self.left[what] -= 1
            raise SandboxError("broken")


def complete(runner: Runner, journal: Journal, members: int = 1, concurrent: int = 4) -> None:
    plans = [RolloutPlan(key(n), 0, TASK, lambda: TokenClock(10, 0), seed=n) for n in range(members)]
    asyncio.run(complete_rollouts(plans, runner, journal, concurrent=concurrent))


def test_only_what_is_missing_is_done(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    play(journal, 0)
    journal.record_grade(key(0), GRADE)
    play(journal, 1)
    journal.record_failure(key(2), 0, "t", "e")
    runner = Runner()
    complete(runner, journal, members=5)
    assert runner.calls == {"play": 2, "grade": 3}
    states = [record.state for record in journal.rollouts("train", 3)]
    assert states == [*[RolloutState.GRADED] * 2, RolloutState.FAILED, *[RolloutState.GRADED] * 2]


def test_failures_of_infrastructure_are_tried_again_and_then_recorded(tmp_path: Path) -> None:
    journal = opened(tmp_path)
    runner = Runner(play_failures=2)
    complete(runner, journal)
    assert runner.calls == {"play": 3, "grade": 1}
    assert journal.rollouts("train", 3)[0].score == 0.75

    other = opened(tmp_path / "other")
    runner = Runner(grade_failures=1)
    complete(runner, other)
    assert runner.calls == {"play": 1, "grade": 2}  # not played again

    third = opened(tmp_path / "third")
    complete(Runner(play_failures=9), third)
    failed = third.rollouts("train", 3)[0]
    assert failed.state is RolloutState.FAILED and "SandboxError: broken" in str(failed.error)


def test_not_more_at_one_time_than_allowed(tmp_path: Path) -> None:
    runner = Runner()
    complete(runner, opened(tmp_path), members=20, concurrent=3)
    assert runner.at_once[1] == 3


def test_a_users_error_ends_all(tmp_path: Path) -> None:
    class Wrong(Runner):
        async def play(self, task: Task, clock: object, seed: int, submission: Path) -> Episode:
            raise ValueError("the task does not fit")

    with pytest.raises(ValueError, match="does not fit"):
        complete(Wrong(), opened(tmp_path), members=5)
