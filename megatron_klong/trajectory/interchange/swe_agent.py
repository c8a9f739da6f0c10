"""SWE-agent ``.traj``, 0.x and 1.x: one run a file; its ``history`` is the conversation.

Demonstrations (``is_demo``) are context. So is what the harness writes in the assistant's name when it ends a
run (``exit_cost`` and its like). In 1.x a tool's result names its call in ``tool_call_ids``. The steps in
``trajectory`` repeat the history with times and states: they go to ``metadata``, without the copies of the
model's input that every step has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import Field

from megatron_klong.trajectory.interchange.conversation import Draft
from megatron_klong.trajectory.interchange.openai_chat import OpenAIMessage, to_message
from megatron_klong.trajectory.interchange.sources import SourceRecord, read_records
from megatron_klong.trajectory.interchange.wire import Wire
from megatron_klong.trajectory.schema import Message

_COPIES = ("messages", "query")


class _Said(OpenAIMessage):
    is_demo: bool = False
    action: str | None = None
    thought: str | None = None
    tool_call_ids: list[str] = []
    thinking_blocks: list[dict[str, Any]] = []


class _Record(Wire):
    history: list[_Said] = Field(min_length=1)
    trajectory: list[dict[str, Any]] = []
    environment: str | None = None


class SweAgent:
    """See the module's text."""

    name = "swe-agent"
    describes = "SWE-agent .traj, 0.x and 1.x"

    def claims(self, keys: frozenset[str]) -> bool:
        return {"history", "trajectory"} <= keys

    def records(self, file: Path) -> Iterator[SourceRecord]:
        return read_records(file)

    def draft(self, value: Any) -> Draft:
        record = _Record.model_validate(value)
        steps = [
            {key: each for key, each in step.items() if key not in _COPIES} for step in record.trajectory
        ]
        return Draft(
            messages=tuple(_message(said) for said in record.history),
            task_id=record.environment,
            metadata={**record.unknown, "trajectory": steps},
            origins=tuple(f"history.{number}" for number in range(len(record.history))),
        )


def _message(said: _Said) -> Message:
    message = to_message(said)
    kept = {
        "action": said.action, "thought": said.thought, "is_demo": said.is_demo or None,
        "thinking_blocks": said.thinking_blocks or None,
        "tool_call_ids": said.tool_call_ids if len(said.tool_call_ids) > 1 else None,
    }  # fmt: skip
    metadata = message.metadata | {name: value for name, value in kept.items() if value is not None}
    reasoning = "\n".join(str(block["thinking"]) for block in said.thinking_blocks if "thinking" in block)
    return replace(
        message,
        reasoning_content=message.reasoning_content or reasoning or None,
        tool_call_id=message.tool_call_id or (said.tool_call_ids[0] if said.tool_call_ids else None),
        context_only=message.context_only or said.is_demo or _by_the_harness(said),
        metadata=metadata,
    )


def _by_the_harness(said: _Said) -> bool:
    """Whether the harness wrote this in the assistant's name, to end the run."""
    return said.role == "assistant" and (
        (said.action or "").startswith("exit_")
        or (said.content == said.thought and (said.content or "").startswith("Exit due to "))
    )
