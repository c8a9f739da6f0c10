"""The generated domain: the expert acts through tools, the grade is earned, the rubric is right."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_klong.factory.generate import generate_domain
from megatron_klong.factory.replication import (
    ReplicationEnvironment,
    ReplicationTask,
    experiments_done,
    expert_trajectory,
    generate_tasks,
)
from megatron_klong.trajectory.importing import read_imported
from megatron_klong.trajectory.render import load_renderer
from megatron_klong.trajectory.schema import ToolCall

TASK = ReplicationTask("t", key=7, measurements=("42", "90", "05"))


def calls_of(experiments: int | None = None) -> list[tuple[str, dict[str, str]]]:
    trajectory = expert_trajectory(TASK, experiments)
    return [(call.name, call.arguments) for message in trajectory.messages for call in message.tool_calls]


def test_the_expert_solves_a_task_through_its_tools() -> None:
    assert calls_of() == [
        ("read_paper", {"section": "method"}),
        ("bash", {"command": "run 01"}),
        ("write_file", {"path": "01", "content": "427"}),
        ("bash", {"command": "run 02"}),
        ("write_file", {"path": "02", "content": "907"}),
        ("bash", {"command": "run 03"}),
        ("write_file", {"path": "03", "content": "057"}),
        ("submit", {}),
    ]
    assert expert_trajectory(TASK).reward == 1.0


def test_a_hurried_expert_hands_in_early_and_earns_less() -> None:
    assert calls_of(1) == [*calls_of()[:3], ("submit", {})]
    assert expert_trajectory(TASK, 1).reward == pytest.approx(1 / 3)
    tasks = list(generate_tasks(300, 3, (5, 9)))
    done = [experiments_done(task, 0.8) for task in tasks]
    assert all(1 <= count <= len(task.measurements) for count, task in zip(done, tasks))
    hurried = sum(count < len(task.measurements) for count, task in zip(done, tasks))
    assert 0.7 < hurried / 300 < 0.9
    assert [experiments_done(task, 0.0) for task in tasks] == [len(task.measurements) for task in tasks]


def test_wrong_work_earns_less() -> None:
    environment = ReplicationEnvironment(TASK)
    assert environment.grade() == 0.0
    environment.call(ToolCall("write_file", {"path": "01", "content": "427"}))
    environment.call(ToolCall("write_file", {"path": "02", "content": "900"}))
    assert environment.grade() == pytest.approx(1 / 3)
    # An expert that works from another key fails: nothing but the paper tells it.
    replayed = ReplicationEnvironment(replace(TASK, key=8))
    for message in expert_trajectory(TASK).messages:
        for call in message.tool_calls:
            replayed.call(call)
    assert replayed.grade() == 0.0


def test_tasks_come_from_the_seed() -> None:
    first, again = list(generate_tasks(20, 1)), list(generate_tasks(20, 1))
    assert first == again
    assert first[:10] == list(generate_tasks(10, 1))
    assert {task.measurements for task in first}.isdisjoint(
        task.measurements for task in generate_tasks(20, 2)
    )
    assert {task.key for task in generate_tasks(200, 1)} == set(range(10))


def test_generating_again_replaces_what_was_there(tmp_path: Path) -> None:
    for seed, count in ((0, 3), (1, 2)):
        generate_domain(tmp_path, count=count, seed=seed, renderer="glm-4.5", inserted_texts=())
    names = sorted(path.name for path in (tmp_path / "tasks").iterdir())
    assert names == ["replication-1-00000", "replication-1-00001"]


def test_files_of_the_domain(domain: Path) -> None:
    trajectories = list(read_imported(domain / "trajectories.jsonl"))
    assert len(trajectories) == 12
    assert {trajectory.reward for trajectory in trajectories} == {1.0}
    folder = domain / "tasks" / str(trajectories[0].task_id)
    rubric = json.loads((folder / "rubric.json").read_text())
    written = [
        call.arguments["content"]
        for message in trajectories[0].messages
        for call in message.tool_calls
        if call.name == "write_file"
    ]
    assert [leaf["requirements"].split()[3].rstrip(",") for leaf in rubric["sub_tasks"]] == written
    assert set(rubric) == {
        "id", "requirements", "weight", "sub_tasks", "task_category", "finegrained_task_category",
    }  # fmt: skip


def test_the_tokenizer_makes_turns_short(domain: Path) -> None:
    renderer = load_renderer("glm-4.5", domain / "tokenizer")
    assert renderer.vocab_size <= 320  # the example model's vocabulary
    for trajectory in read_imported(domain / "trajectories.jsonl"):
        turns = renderer.render(trajectory).turns
        assert max(len(turn.action_ids) + len(turn.answer_ids) for turn in turns) <= 12
