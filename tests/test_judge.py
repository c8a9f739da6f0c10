"""Rubric trees, and executable checks in a real sandbox."""

from __future__ import annotations

import asyncio
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_klong.config import SandboxConfig
from megatron_klong.judge.execute import grade_submission, leaf_grade
from megatron_klong.judge.rubric import (
    Check,
    LeafGrade,
    NodeGrade,
    RubricNode,
    grade_tree,
    parse_rubric,
    read_checks,
    read_rubric,
)
from megatron_klong.rollout.task import read_task, task_folders
from megatron_klong.sandbox.base import CommandResult, SandboxSpec
from megatron_klong.sandbox.bubblewrap import Bubblewrap

LIMITS = SandboxConfig(memory_mib=128, processes=16, disk_mib=1, command_seconds=2)


def node(name: str, weight: float, *children: dict[str, Any]) -> dict[str, Any]:
    return {"id": name, "requirements": "r", "weight": weight, "sub_tasks": list(children),
            "task_category": None, "finegrained_task_category": None}  # fmt: skip


def exact(raw: dict[str, Any], scores: dict[str, Fraction]) -> Fraction:
    """The rule of the format, in fractions."""
    if not raw["sub_tasks"]:
        return scores[raw["id"]]
    total = sum(Fraction(child["weight"]) for child in raw["sub_tasks"])
    if not total:
        return Fraction(0)
    return sum(Fraction(child["weight"]) * exact(child, scores) for child in raw["sub_tasks"]) / total


trees = st.recursive(
    st.builds(lambda weight: node("", weight), st.integers(0, 5)),
    lambda children: st.builds(
        lambda weight, below: node("", weight, *below),
        st.integers(0, 5),
        st.lists(children, min_size=1, max_size=4),
    ),
    max_leaves=15,
)


@given(trees, st.randoms())
def test_scores_are_weighted_means_all_the_way_up(raw: dict[str, Any], random: Any) -> None:
    def number(tree: dict[str, Any], name: str) -> None:
        tree["id"] = name
        for place, child in enumerate(tree["sub_tasks"]):
            number(child, f"{name}.{place}")

    number(raw, "0")
    rubric = parse_rubric(raw, "test")
    scores = {leaf.id: Fraction(random.randint(0, 4), 4) for leaf in rubric.leaves()}
    grade = grade_tree(rubric, {name: LeafGrade(float(score), "e") for name, score in scores.items()})
    assert grade.score == pytest.approx(float(exact(raw, scores)))
    found = {}

    def collect(graded: NodeGrade) -> None:
        if not graded.sub_tasks:
            found[graded.id] = graded.evidence
        for child in graded.sub_tasks:
            collect(child)

    collect(grade)
    assert found == dict.fromkeys(scores, "e")


def test_real_rubrics_are_read_and_graded(shared_data: Path) -> None:
    for file in sorted((shared_data / "paperbench").glob("*/rubric.json")):
        raw = json.loads(file.read_text())
        rubric = read_rubric(file)
        leaves = list(rubric.leaves())
        assert len(leaves) > 50
        scores = {leaf.id: Fraction(number % 3, 2) for number, leaf in enumerate(leaves)}
        grade = grade_tree(rubric, {name: LeafGrade(float(score), "") for name, score in scores.items()})
        assert grade.score == pytest.approx(float(exact(raw, scores)))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (node("a", -1), "weight"),
        ({"id": "a", "weight": 1}, "requirements"),
        (node("a", 1, node("b", 1), node("b", 2)), "the id 'b' occurs twice"),
        (node("a", 1, {"id": "", "requirements": "", "weight": 1}), r"sub_tasks\.0\.id"),
        (node("a", float("nan")), "weight"),
        ([], "rubric test"),
    ],
)
def test_bad_rubrics_name_the_field(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_rubric(raw, "test")


def test_every_leaf_has_one_check(tmp_path: Path) -> None:
    rubric = parse_rubric(node("a", 1, node("b", 1), node("c", 1)), "test")
    file = tmp_path / "checks.json"
    for checks, message in (
        ({"b": {"command": "true"}}, "'c'"),
        ({"b": {"command": "true"}, "c": {"command": "true"}, "d": {"command": "true"}}, "'d'"),
        ({"b": {"command": "true"}, "c": {"command": ""}}, "command|at least 1"),
        ([], "must name each leaf"),
    ):
        file.write_text(json.dumps(checks))
        with pytest.raises(ValueError, match=message):
            read_checks(file, rubric)
    file.write_text("{")
    with pytest.raises(ValueError, match="cannot be read as JSON"):
        read_checks(file, rubric)


@pytest.mark.parametrize(
    ("exit_code", "output", "score"),
    [
        (0, "", 1.0),
        (0, "fine\n", 1.0),
        (0, "half of it\nscore: 0.5\n", 0.5),
        (0, "score: 0\n", 0.0),
        (0, "score: 1.7\n", 0.0),
        (0, "score: 5e-05\n", 5e-05),
        (0, "score: -0.2\n", 0.0),
        (0, "score: nan\n", 0.0),
        (0, "score: full\n", 0.0),
        (0, "score: 0.5\nand more", 1.0),
        (0, "score: 9\n", 0.0),
        (1, "score: 1\n", 0.0),
        (-9, "", 0.0),
        (None, "score: 1\n", 0.0),
    ],
)
def test_what_a_check_is_worth(exit_code: int | None, output: str, score: float) -> None:
    assert leaf_grade(CommandResult(exit_code, output, 1.0)).score == score


def test_a_submission_is_graded_in_a_sandbox_of_its_own(tmp_path: Path) -> None:
    """The submission cannot reach its judge: what it left running is gone, and neither its settings of bash
    and Python nor its modules are used; nor does what one check runs stay for the next."""
    backend = Bubblewrap()
    names = ("part", "slow", "wrong", "python", "module", "stays", "gone")
    rubric = parse_rubric(node("root", 1, node("file", 3), *(node(name, 1) for name in names)), "test")
    checks = {
        "file": Check(command='[ "$(cat result)" = 42 ] && echo found'),
        "part": Check(command="echo score: 0.25"),
        "slow": Check(command="sleep 100"),
        "wrong": Check(command="echo no result2; test -e result2"),
        "python": Check(command="python3 -c 'raise SystemExit(3)'"),
        "module": Check(command="python3 -c 'import json; json.loads(\"1\")'"),
        "stays": Check(command="sleep 87654 & echo started"),
        "gone": Check(command="! cat /proc/*/cmdline | tr '\\0' ' ' | grep -q 'sleep [8]7654'"),
    }

    async def grade() -> NodeGrade:
        agent = await backend.open(SandboxSpec(LIMITS))
        await agent.run("echo 42 > result; touch /tmp/result2; echo 'exit 0' > .bashrc", 5)
        await agent.run(
            "d=$(python3 -c 'import site; print(site.getusersitepackages())'); mkdir -p $d; "
            "echo 'import os; os._exit(0)' > $d/usercustomize.py; echo 'raise ImportError' > json.py", 5
        )  # fmt: skip
        await agent.archive(tmp_path / "s.tar")
        await agent.close()
        return await grade_submission(tmp_path / "s.tar", rubric, checks, backend, SandboxSpec(LIMITS))

    grade_ = asyncio.run(grade())
    assert grade_.score == pytest.approx((3 * 1 + 0.25 + 1 + 1 + 1) / 10)
    evidence = {child.id: child.evidence for child in grade_.sub_tasks}
    assert evidence == {
        "file": "exit code 0: found", "part": "exit code 0: score: 0.25",
        "slow": "ended after 2 s, its time limit", "wrong": "exit code 1: no result2",
        "python": "exit code 3", "module": "exit code 0", "stays": "exit code 0: started",
        "gone": "exit code 0",
    }  # fmt: skip


def test_a_submission_that_does_not_unpack_scores_nothing(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(b"no tar at all" * 1000)
    rubric = parse_rubric(node("root", 1, node("leaf", 1)), "test")
    checks = {"leaf": Check(command="true")}
    grade = asyncio.run(
        grade_submission(tmp_path / "s.tar", rubric, checks, Bubblewrap(), SandboxSpec(LIMITS))
    )
    assert grade.score == 0 and "does not unpack" in str(grade.sub_tasks[0].evidence)


def test_tasks_of_the_generated_domain(domain: Path, tmp_path: Path) -> None:
    folders = task_folders(domain / "tasks")
    assert len(folders) == 12
    task = read_task(folders[0])
    leaves = list(task.rubric.leaves())
    assert list(task.checks) == [leaf.id for leaf in leaves]
    assert set(task.agent.sections) == {"method"}
    assert "followed by" in task.agent.sections["method"]
    right = [leaf.requirements.split()[3].rstrip(",") for leaf in leaves]
    backend = Bubblewrap()

    async def grade() -> NodeGrade:
        sandbox = await backend.open(SandboxSpec(LIMITS, task.read_only, task.path))
        for number, result in enumerate(right[:-1], 1):
            measured = await sandbox.run(f"run {number:02d}", 5)
            assert measured.output == f"{result[:2]}\n"
            await sandbox.write_file(f"{number:02d}", result.encode() + b"\n" * (number % 2))
        nothing = await sandbox.run("run 99", 5)
        assert nothing.exit_code == 1 and "no experiment '99'" in nothing.output
        assert (await sandbox.run("ls /task", 5)).output == "bin\nmeasurements\n"  # neither rubric nor checks
        await sandbox.archive(tmp_path / "s.tar")
        await sandbox.close()
        return await grade_submission(
            tmp_path / "s.tar", task.rubric, task.checks, backend, SandboxSpec(LIMITS)
        )

    assert asyncio.run(grade()).score == pytest.approx((len(right) - 1) / len(right))


def test_task_folders_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder in it has a task\.json"):
        task_folders(tmp_path)
    (tmp_path / "task.json").write_text('{"id": "a", "messages": [{"role": "user"}]}')
    with pytest.raises(ValueError, match=r"messages\.0\.content"):
        read_task(tmp_path)
    (tmp_path / "task.json").write_text('{"id": "a", "messages": [{"role": "user", "content": "x"}]}')
    with pytest.raises(ValueError, match=r"paper\.md"):
        read_task(tmp_path)


def test_rubric_nodes_keep_unknown_fields() -> None:
    raw = node("a", 1) | {"note": "x"}
    assert isinstance(parse_rubric(raw, "test"), RubricNode)
