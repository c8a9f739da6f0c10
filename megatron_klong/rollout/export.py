"""Rollouts of a run as trajectories: with their grades, and the token ids and log-probs that were sampled."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_klong.rollout.journal import RolloutState
from megatron_klong.trajectory.interchange.openai_chat import OpenAIChat
from megatron_klong.trajectory.schema import Message, Trajectory


def is_run(folder: Path) -> bool:
    """Whether a folder is the directory of a run that has rollouts."""
    return _database(folder).is_file()


def rollout_trajectories(run: Path) -> Iterator[Trajectory]:
    """All graded rollouts of a run directory, by id; the run may go on meanwhile.

    Each message of the assistant has in ``metadata.step.metrics`` what ATIF has there:
    ``completion_token_ids`` and ``logprobs``, under the distribution that they were sampled from. A message
    in which nothing was said stays as it is; importers refuse it.
    """
    with sqlite3.connect(f"file:{_database(run)}?mode=ro", uri=True) as database:
        rows = database.execute(
            "SELECT id, task_id, score, conversation, purpose, iteration, stage, stop FROM rollouts"
            " WHERE state = ? ORDER BY id", (RolloutState.GRADED,),
        )  # fmt: skip
        for name, task, score, conversation, *place in rows:
            messages = OpenAIChat().draft(json.loads(conversation)).messages
            metadata = dict(zip(("purpose", "iteration", "stage", "stop"), place))
            with np.load(run / "rollouts" / "episodes" / f"{name}.npz") as arrays:
                sampled = list(_sampled(arrays["tokens"], arrays["bounds"], arrays["log_probs"]))
            yield Trajectory(
                name, tuple(_with_ids(_with_tokens(messages, sampled))), task_id=task, reward=score,
                metadata={"rollout": metadata},
            )  # fmt: skip


def _database(run: Path) -> Path:
    return run / "rollouts" / "journal.sqlite"


def _sampled(
    tokens: np.ndarray, bounds: np.ndarray, log_probs: np.ndarray
) -> Iterator[tuple[list[int], list[float]]]:
    """Ids and log-probs of each action; what opens an action was not sampled, and is equally long in all."""
    starts, stops = bounds[1:-1:2], bounds[2::2]
    opening = (int((stops - starts).sum()) - len(log_probs)) // max(len(starts), 1)
    place = 0
    for start, stop in zip((starts + opening).tolist(), stops.tolist()):
        yield tokens[start:stop].tolist(), log_probs[place : place + stop - start].tolist()
        place += stop - start


def _with_tokens(
    messages: Sequence[Message], sampled: Sequence[tuple[list[int], list[float]]]
) -> Iterator[Message]:
    left = iter(sampled)
    for message in messages:
        if message.role == "assistant" and (found := next(left, None)) is not None:
            metrics = {"completion_token_ids": found[0], "logprobs": found[1]}
            message = replace(message, metadata={**message.metadata, "step": {"metrics": metrics}})
        yield message


def _with_ids(messages: Iterable[Message]) -> Iterator[Message]:
    """Calls get ids, and results those of their calls, which are answered in their order."""
    waiting: list[str] = []
    for number, message in enumerate(messages):
        if message.role == "assistant":
            waiting = [f"call-{number}-{place}" for place in range(len(message.tool_calls))]
            calls = tuple(replace(call, id=name) for call, name in zip(message.tool_calls, waiting))
            yield replace(message, tool_calls=calls)
        elif message.role == "tool" and waiting:
            yield replace(message, tool_call_id=waiting.pop(0))
        else:
            yield message
