"""Task folders: what an agent is asked, what it may see, and how its work is graded.

::

    ID/task.json     {"id", "messages": [{"role", "content"}, ...], "path": ["bin"]}
    ID/paper.md      sections under ``## NAME`` headings, for read_paper
    ID/public/       shown to the agent at /task, read-only; the folders of "path" are searched for programs
    ID/rubric.json   PaperBench's format; never seen by the agent
    ID/checks.json   {leaf id: {"command": ...}}; never seen by the agent
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_klong.agent.episode import AgentTask
from megatron_klong.judge.rubric import Check, RubricNode, read_checks, read_rubric
from megatron_klong.trajectory.schema import Message

SHOWN_AT = "/task"
_HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


class TaskMessage(BaseModel):
    """A message before the first action."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user"]
    content: str


class TaskFile(BaseModel):
    """``task.json``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(min_length=1)
    messages: tuple[TaskMessage, ...] = Field(min_length=1)
    path: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """A task, ready to be played and graded.

    Attributes:
        agent: what the agent is told.
        read_only: folders that the agent's sandbox shows, by their path inside.
        path: where its sandbox looks for programs first.
    """

    agent: AgentTask
    read_only: Mapping[str, Path]
    path: tuple[str, ...]
    rubric: RubricNode
    checks: Mapping[str, Check]


def read_task(folder: Path) -> Task:
    """Read a task folder.

    Raises:
        ValueError: a file is missing or wrong; names it.
    """
    file = folder / "task.json"
    try:
        raw = TaskFile.model_validate(json.loads(file.read_text(encoding="utf-8")))
        paper = (folder / "paper.md").read_text(encoding="utf-8")
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"task {file}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"task {folder}: {error}") from error
    rubric = read_rubric(folder / "rubric.json")
    messages = tuple(Message(message.role, message.content) for message in raw.messages)
    public = folder / "public"
    return Task(
        agent=AgentTask(raw.id, messages, paper_sections(paper)),
        read_only={SHOWN_AT: public.resolve()} if public.is_dir() else {},
        path=tuple(f"{SHOWN_AT}/{name}" for name in raw.path),
        rubric=rubric,
        checks=read_checks(folder / "checks.json", rubric),
    )


def task_folders(root: Path) -> list[Path]:
    """All task folders below a folder, sorted by name.

    Raises:
        ValueError: there are none.
    """
    found = sorted(file.parent for file in root.glob("*/task.json"))
    if not found:
        raise ValueError(
            f"tasks {root}: no folder in it has a task.json; `klong factory generate` makes some"
        )
    return found


def paper_sections(paper: str) -> Mapping[str, str]:
    """The text under each ``## NAME`` heading of a paper in Markdown."""
    _, *parts = _HEADING.split(paper)
    return {name.strip(): text.strip() for name, text in zip(parts[::2], parts[1::2])}
