"""Rubric trees in PaperBench's format (``id, requirements, weight, sub_tasks, ...``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError


class RubricNode(BaseModel):
    """A requirement: a leaf is graded, another node is the weighted mean of those below it."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    id: str = Field(min_length=1)
    requirements: str
    weight: float = Field(ge=0)
    sub_tasks: tuple[RubricNode, ...] = ()
    task_category: str | None = None
    finegrained_task_category: str | None = None

    def leaves(self) -> Iterator[RubricNode]:
        """Those without sub-tasks, in order."""
        return (node for node in self.nodes() if not node.sub_tasks)

    def nodes(self) -> Iterator[RubricNode]:
        """All of the tree, each before those below it."""
        yield self
        for child in self.sub_tasks:
            yield from child.nodes()


class Check(BaseModel):
    """How a leaf is graded: a command in a sandbox that holds the submission in its working folder.

    An exit code other than 0 scores 0. With exit code 0 the leaf scores 1, or what a last line
    ``score: NUMBER`` of its output says, from 0 to 1; any other number there scores 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str = Field(min_length=1)


@dataclass(frozen=True)
class LeafGrade:
    """What a leaf earned, and why."""

    score: float
    evidence: str


@dataclass(frozen=True)
class NodeGrade:
    """One node of a graded tree.

    Attributes:
        score: in [0, 1].
        evidence: of a leaf: what its check printed.
    """

    id: str
    weight: float
    score: float
    evidence: str | None
    sub_tasks: tuple[NodeGrade, ...] = ()


def parse_rubric(raw: Any, origin: str) -> RubricNode:
    """Validate a rubric.

    Raises:
        ValueError: names the field; also for an id that occurs twice.
    """
    try:
        rubric = RubricNode.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"rubric {origin}: {where}: {first['msg']}") from error
    seen: set[str] = set()
    for node in rubric.nodes():
        if node.id in seen:
            raise ValueError(f"rubric {origin}: the id {node.id!r} occurs twice")
        seen.add(node.id)
    return rubric


def read_rubric(file: Path) -> RubricNode:
    """Read ``rubric.json``; ValueError where it is none."""
    return parse_rubric(_read_json(file), str(file))


def read_checks(file: Path, rubric: RubricNode) -> Mapping[str, Check]:
    """Read ``checks.json``: the check of every leaf, by its id.

    Raises:
        ValueError: a leaf has none, or one is for no leaf.
    """
    raw = _read_json(file)
    leaves = {leaf.id for leaf in rubric.leaves()}
    if not isinstance(raw, dict) or raw.keys() != leaves:
        given = set(raw) if isinstance(raw, dict) else set()
        odd = sorted(leaves ^ given)
        raise ValueError(
            f"checks {file}: must name each leaf of the rubric; see {odd[0] if odd else 'its form'!r}"
        )
    try:
        return {name: Check.model_validate(check) for name, check in raw.items()}
    except ValidationError as error:
        raise ValueError(f"checks {file}: {error.errors()[0]['msg']}") from error


def grade_tree(node: RubricNode, leaves: Mapping[str, LeafGrade]) -> NodeGrade:
    """Grade a tree from its leaves: sum(w s) / sum(w) over a node's children, 0 if the weights sum to 0."""
    if not node.sub_tasks:
        leaf = leaves[node.id]
        return NodeGrade(node.id, node.weight, leaf.score, leaf.evidence)
    children = tuple(grade_tree(child, leaves) for child in node.sub_tasks)
    weights = sum(child.weight for child in children)
    score = sum(child.weight * child.score for child in children) / weights if weights else 0.0
    return NodeGrade(node.id, node.weight, score, None, children)


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read as JSON: {error}") from error
