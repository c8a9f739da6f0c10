"""Grading by executable checks: a fresh sandbox with the submission, one command for each leaf."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

from megatron_klong.judge.rubric import Check, LeafGrade, NodeGrade, RubricNode, grade_tree
from megatron_klong.sandbox.base import ArchiveError, CommandResult, SandboxBackend, SandboxSpec

_SCORE = re.compile(r"^score:\s*(.*)$")
_EVIDENCE_CHARACTERS = 400
_ENVIRONMENT = MappingProxyType({"HOME": "/tmp", "PYTHONNOUSERSITE": "1", "PYTHONSAFEPATH": "1"})
"""The judge's programs take nothing of a submission for their own settings: its files are in the working
folder, which is neither the home of checks nor searched for modules (a check that wants that sets
PYTHONPATH)."""


async def grade_submission(
    archive: Path, rubric: RubricNode, checks: Mapping[str, Check], backend: SandboxBackend, spec: SandboxSpec
) -> NodeGrade:
    """Unpack a submission in a sandbox that the agent never saw, and check every leaf.

    The leaves of one submission share the sandbox; what a check leaves running is ended before the next. A
    submission that does not unpack scores 0.

    Args:
        archive: the agent's working folder, as :meth:`Sandbox.archive` wrote it.
        spec: of the agent's sandbox; this one has twice the disk.

    Raises:
        SandboxError: the sandbox failed.
    """
    limits = spec.limits.model_copy(update={"disk_mib": 2 * spec.limits.disk_mib})
    sandbox = await backend.open(replace(spec, limits=limits, environment=_ENVIRONMENT))
    leaves: dict[str, LeafGrade] = {}
    try:
        await sandbox.unpack(archive)
        for leaf in rubric.leaves():
            leaves[leaf.id] = leaf_grade(
                await sandbox.run(checks[leaf.id].command, spec.limits.command_seconds)
            )
            await sandbox.end_processes()
    except ArchiveError as error:
        leaves = {leaf.id: LeafGrade(0.0, str(error)) for leaf in rubric.leaves()}
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
    if stated is None:
        return LeafGrade(1.0, evidence)
    try:
        score = float(stated[1])
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        return LeafGrade(0.0, f"{evidence} (a score must be a number from 0 to 1)")
    return LeafGrade(score, evidence)
