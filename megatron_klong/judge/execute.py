"""Grading by executable checks: a fresh sandbox with the submission, one command for each leaf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from megatron_klong.judge.rubric import Check, LeafGrade, NodeGrade, RubricNode, grade_tree
from megatron_klong.sandbox.base import CommandResult, SandboxBackend, SandboxSpec

_SCORE = re.compile(r"^score: ([01](?:\.\d*)?)$")
_EVIDENCE_CHARACTERS = 400


async def grade_submission(
    archive: Path, rubric: RubricNode, checks: Mapping[str, Check], backend: SandboxBackend, spec: SandboxSpec
) -> NodeGrade:
    """Unpack a submission in a sandbox that the agent never saw, and check every leaf.

    Args:
        archive: the agent's working folder, as :meth:`Sandbox.archive` wrote it.

    Raises:
        SandboxError: the sandbox failed.
    """
    sandbox = await backend.open(spec)
    try:
        await sandbox.unpack(archive)
        leaves = {
            leaf.id: leaf_grade(await sandbox.run(checks[leaf.id].command, spec.limits.command_seconds))
            for leaf in rubric.leaves()
        }
    finally:
        await sandbox.close()
    return grade_tree(rubric, leaves)


def leaf_grade(result: CommandResult) -> LeafGrade:
    """What a check's result is worth (see :class:`Check`)."""
    if result.exit_code is None:
        return LeafGrade(0.0, f"ended after {result.seconds:.0f} s, its time limit")
    shown = result.output[-_EVIDENCE_CHARACTERS:].strip()
    evidence = f"exit code {result.exit_code}" + (f": {shown}" if shown else "")
    if result.exit_code:
        return LeafGrade(0.0, evidence)
    lines = result.output.strip().splitlines()
    stated = _SCORE.match(lines[-1]) if lines else None
    return LeafGrade(min(1.0, float(stated[1])) if stated else 1.0, evidence)
