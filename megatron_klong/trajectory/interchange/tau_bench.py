"""tau-bench results: a JSON array of ``{"task_id", "trial", "reward", "info", "traj"}``; ``traj`` is OpenAI
chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.openai_chat import OpenAIMessage, to_message
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire


class _Record(Wire):
    traj: list[OpenAIMessage] = Field(min_length=1)
    task_id: str | int | None = None
    reward: float | None = None


class TauBench:
    """See the module's text."""

    name = "tau-bench"
    describes = "tau-bench results: a JSON array of runs with traj"

    def claims(self, keys: frozenset[str]) -> bool:
        return {"traj", "reward"} <= keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        record = _Record.model_validate(value)
        return Draft(
            messages=tuple(to_message(message) for message in record.traj),
            task_id=None if record.task_id is None else str(record.task_id),
            reward=record.reward,
            metadata=record.unknown,
            origins=tuple(f"traj.{number}" for number in range(len(record.traj))),
        )
