"""The journal: every rollout that was played, on disk before anyone counts on it.

``journal.sqlite`` has one row for each rollout; its tokens lie beside it in ``episodes/ID.npz``, its
submission in ``submissions/ID.tar``. A row is written after its files, so a row always has them. After a
crash, what was played is only graded, and what was graded is only read.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Literal

import numpy as np

from megatron_klong.agent.clock import BudgetReport
from megatron_klong.agent.episode import Episode, StopReason
from megatron_klong.judge.rubric import NodeGrade
from megatron_klong.trajectory.interchange.openai_chat import write_openai_chat
from megatron_klong.trajectory.schema import Trajectory

Purpose = Literal["train", "evaluation"]

_SCHEMA = """
CREATE TABLE IF NOT EXISTS rollouts (
    id TEXT PRIMARY KEY,
    purpose TEXT NOT NULL,
    iteration INTEGER NOT NULL,
    group_number INTEGER NOT NULL,
    member INTEGER NOT NULL,
    stage INTEGER NOT NULL,
    task_id TEXT NOT NULL,
    state TEXT NOT NULL,
    stop TEXT,
    version TEXT,
    turns INTEGER,
    generated_tokens INTEGER,
    budget TEXT,
    conversation TEXT,
    score REAL,
    grade TEXT,
    error TEXT
) STRICT;
CREATE INDEX IF NOT EXISTS by_place ON rollouts (purpose, iteration, group_number, member);
"""


class RolloutState(StrEnum):
    """How far a rollout has come."""

    PLAYED = "played"
    GRADED = "graded"
    FAILED = "failed"


@dataclass(frozen=True, order=True)
class RolloutKey:
    """Which rollout: the same after a restart, since groups are drawn from the seed.

    Attributes:
        iteration: whose weights it is played under; of an evaluation, that which is evaluated.
        group: number of the group in the iteration; its rollouts have the same task.
        member: number in the group.
    """

    purpose: Purpose
    iteration: int
    group: int
    member: int

    @property
    def id(self) -> str:
        """As text, such as ``train-00003-005-02``."""
        return f"{self.purpose}-{self.iteration:05d}-{self.group:03d}-{self.member:02d}"


@dataclass(frozen=True)
class RolloutRecord:
    """One row of the journal; what is not known yet, or never will be, is None."""

    key: RolloutKey
    stage: int
    task_id: str
    state: RolloutState
    stop: StopReason | None
    version: str | None
    turns: int | None
    generated_tokens: int | None
    budget: BudgetReport | None
    score: float | None
    error: str | None


@dataclass(frozen=True)
class PlayedTokens:
    """The tokens of an episode, in blocks: initial messages, then action and answer of every turn.

    Attributes:
        tokens: of all blocks, int32; an action begins with its opening.
        bounds: where blocks begin, int64, one more than blocks.
        log_probs: of all sampled tokens in order, float32; openings have none.
        reading: by turn, whether all its calls went to reading tools, bool.
        prompt_tokens: by turn, length of the prompt that the engine saw, int64.
        prompt_sha256: by turn, of that prompt.
    """

    tokens: np.ndarray
    bounds: np.ndarray
    log_probs: np.ndarray
    reading: np.ndarray
    prompt_tokens: np.ndarray
    prompt_sha256: np.ndarray


class Journal:
    """The journal in a folder, opened by one process at a time.

    Args:
        opening_ids: what opens an action; kept with each.
        reading_tools: tools whose calls make a turn a reading turn.
    """

    def __init__(self, folder: Path, opening_ids: Sequence[int], reading_tools: Sequence[str]) -> None:
        self._opening = tuple(opening_ids)
        self._reading = frozenset(reading_tools)
        self._episodes = folder / "episodes"
        self._submissions = folder / "submissions"
        for place in (self._episodes, self._submissions):
            place.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(folder / "journal.sqlite", isolation_level=None)
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=FULL")
        self._db.executescript(_SCHEMA)

    def submission(self, key: RolloutKey) -> Path:
        """Where the tar file of a rollout's work belongs."""
        return self._submissions / f"{key.id}.tar"

    def record_played(self, key: RolloutKey, stage: int, task_id: str, episode: Episode) -> None:
        """An episode has ended, and its submission is written."""
        assert self.submission(key).is_file()
        file = self._episodes / f"{key.id}.npz"
        unfinished = file.with_name(f".{key.id}.unfinished.npz")
        with unfinished.open("wb") as stream:
            np.savez(stream, **self._arrays(episode), allow_pickle=False)
            stream.flush()
            os.fsync(stream.fileno())  # the row must not outlast the file in a power failure
        unfinished.replace(file)
        conversation = Trajectory(key.id, episode.messages, task_id=task_id)
        versions = {turn.version for turn in episode.turns}
        self._db.execute(
            "INSERT OR REPLACE INTO rollouts (id, purpose, iteration, group_number, member, stage, task_id,"
            " state, stop, version, turns, generated_tokens, budget, conversation)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                key.id, key.purpose, key.iteration, key.group, key.member, stage, task_id,
                RolloutState.PLAYED, episode.stop, ",".join(sorted(versions)), len(episode.turns),
                sum(len(turn.action_ids) for turn in episode.turns), json.dumps(asdict(episode.budget)),
                write_openai_chat(conversation),
            ),
        )  # fmt: skip

    def record_grade(self, key: RolloutKey, grade: NodeGrade) -> None:
        """A played rollout has its grade."""
        changed = self._db.execute(
            "UPDATE rollouts SET state = ?, score = ?, grade = ? WHERE id = ?",
            (RolloutState.GRADED, grade.score, json.dumps(asdict(grade)), key.id),
        )
        assert changed.rowcount == 1, f"{key.id} was not played"

    def record_failure(self, key: RolloutKey, stage: int, task_id: str, error: str) -> None:
        """Infrastructure failed for a rollout, more often than it is tried again."""
        self._db.execute(
            "INSERT OR REPLACE INTO rollouts (id, purpose, iteration, group_number, member, stage, task_id,"
            " state, error) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (key.id, key.purpose, key.iteration, key.group, key.member, stage, task_id,
             RolloutState.FAILED, error),
        )  # fmt: skip

    def forget_failures(self, purpose: Purpose, iteration: int) -> None:
        """Rollouts of an iteration that infrastructure has failed for are wanted again."""
        self._db.execute(
            "DELETE FROM rollouts WHERE purpose = ? AND iteration = ? AND state = ?",
            (purpose, iteration, RolloutState.FAILED),
        )

    def find(self, key: RolloutKey) -> RolloutRecord | None:
        """A rollout, if it was played or has failed."""
        found = self._select("id = ?", key.id)
        return found[0] if found else None

    def rollouts(self, purpose: Purpose, iteration: int) -> list[RolloutRecord]:
        """All of an iteration, by group and member."""
        return self._select("purpose = ? AND iteration = ?", purpose, iteration)

    def tokens(self, key: RolloutKey) -> PlayedTokens:
        """The tokens of a played rollout."""
        with np.load(self._episodes / f"{key.id}.npz") as arrays:
            return PlayedTokens(**arrays)

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _select(self, condition: str, *values: object) -> list[RolloutRecord]:
        rows = self._db.execute(
            "SELECT purpose, iteration, group_number, member, stage, task_id, state, stop, version, turns,"
            f" generated_tokens, budget, score, error FROM rollouts WHERE {condition} ORDER BY id",
            values,
        )
        return [_record(*row) for row in rows]

    def _arrays(self, episode: Episode) -> dict[str, np.ndarray]:
        blocks = [episode.initial_ids]
        for turn in episode.turns:
            blocks += [(*self._opening, *turn.action_ids), turn.answer_ids]
        reading = [bool(turn.tools) and set(turn.tools) <= self._reading for turn in episode.turns]
        return {
            "tokens": np.array([token for block in blocks for token in block], dtype=np.int32),
            "bounds": np.cumsum([0, *map(len, blocks)], dtype=np.int64),
            "log_probs": np.array([p for turn in episode.turns for p in turn.log_probs], dtype=np.float32),
            "reading": np.array(reading, dtype=bool),
            "prompt_tokens": np.array([turn.prompt_tokens for turn in episode.turns], dtype=np.int64),
            "prompt_sha256": np.array([turn.prompt_sha256 for turn in episode.turns], dtype="U64"),
        }


def _record(
    purpose: Purpose, iteration: int, group: int, member: int, stage: int, task_id: str, state: str,
    stop: str | None, version: str | None, turns: int | None, generated: int | None, budget: str | None,
    score: float | None, error: str | None,
) -> RolloutRecord:  # fmt: skip
    return RolloutRecord(
        key=RolloutKey(purpose, iteration, group, member),
        stage=stage,
        task_id=task_id,
        state=RolloutState(state),
        stop=None if stop is None else StopReason(stop),
        version=version,
        turns=turns,
        generated_tokens=generated,
        budget=None if budget is None else BudgetReport(**json.loads(budget)),
        score=score,
        error=error,
    )
