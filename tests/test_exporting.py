"""Trajectories written in the formats of others, and read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.trajectory.exporting import export_trajectories
from megatron_klong.trajectory.importing import import_trajectories, read_file, read_imported
from megatron_klong.trajectory.interchange import READERS
from megatron_klong.trajectory.interchange.atif import write_atif
from megatron_klong.trajectory.schema import Message, ToolCall, Trajectory
from tests.test_interchange import ATIF, change, only, read
from tests.test_openai_chat import json_values, trajectories

atif_metadata = st.dictionaries(
    st.sampled_from(["step", "result", "atif", "extra", "other"]),
    st.dictionaries(
        st.sampled_from(["extra", "metrics", "timestamp", "agent", "llm_call_count", "schema_version",
                         "notes", "source_call_id", "results_without_content", "megatron_klong"]),
        json_values
        | st.sampled_from([0, {"name": "a", "version": "1"}, [{"extra": {"x": 1}}], "ATIF-v1.2"]),
        max_size=2,
    ),
    max_size=2,
)  # fmt: skip


@st.composite
def odd_trajectories(draw: st.DrawFn) -> Trajectory:
    """Whatever the schema allows, with metadata that look like ATIF's."""
    messages: list[Message] = []
    text = st.sampled_from(["", "x"])
    for turn in range(draw(st.integers(1, 3))):
        ids: list[str | None] = draw(st.sampled_from([[], [None], ["c"], [f"call-{turn}", "d"]]))
        calls = tuple(ToolCall("f", {}, each, draw(atif_metadata)) for each in ids)
        messages.append(
            Message("assistant", draw(text) if ids else "x", draw(st.none() | st.just("")), calls,
                    cut=draw(st.booleans()), metadata=draw(atif_metadata))
        )  # fmt: skip
        for _ in range(draw(st.integers(0, 3))):
            role = draw(st.sampled_from(["user", "system", *(["tool"] if ids else [])]))
            messages.append(
                Message(role, draw(st.sampled_from([None, "", "y"])), draw(st.none() | st.just("r")),
                        tool_call_id=draw(st.sampled_from(ids)) if role == "tool" else None,
                        context_only=draw(st.booleans()), metadata=draw(atif_metadata))
            )  # fmt: skip
    return Trajectory("id", tuple(messages), metadata=draw(atif_metadata))


@settings(max_examples=300, deadline=None)
@given(trajectory=trajectories() | odd_trajectories())
def test_atif_reads_back_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, trajectory: Trajectory
) -> None:
    file = tmp_path_factory.mktemp("atif") / "t.json"
    before = copy.deepcopy(trajectory)
    file.write_text(write_atif(trajectory), encoding="utf-8")
    assert trajectory == before
    assert list(read_file(file, READERS["atif"])) == [trajectory]


def test_writing_leaves_a_trajectory_as_it_is(tmp_path: Path) -> None:
    """Results without content are metadata; those with content stand beside them in the file only."""
    silent = {"step": {"results_without_content": [{"extra": {"x": 1}}]}}
    call = Message("assistant", "", tool_calls=(ToolCall("f", {}, "c"),), metadata=silent)
    trajectory = Trajectory("id", (call, Message("tool", "done", tool_call_id="c")))
    written = write_atif(trajectory)
    assert silent == {"step": {"results_without_content": [{"extra": {"x": 1}}]}}
    assert write_atif(trajectory) == written


def test_atif_has_a_place_for_what_came_from_atif(tmp_path: Path) -> None:
    """Times, metrics, tools and agents stand in ATIF's own fields, not in an extra of ours."""
    main = only(read(tmp_path, "atif", change(ATIF, "subagent_trajectories", to=[])))
    written = json.loads(write_atif(main))
    assert written["schema_version"] == "ATIF-v1.7"
    assert written["agent"] == ATIF["agent"]
    assert written["steps"][4]["metrics"] == ATIF["steps"][4]["metrics"]
    assert written["steps"][4]["tool_calls"] == ATIF["steps"][4]["tool_calls"]
    assert [result.get("source_call_id") for result in written["steps"][4]["observation"]["results"]] == [
        None, "c1", "c2",
    ]  # fmt: skip
    assert all("extra" not in step for step in written["steps"])


@pytest.mark.parametrize("to", ["openai", "atif"])
def test_what_is_exported_is_imported_equal(tmp_path: Path, shared_data: Path, to: str) -> None:
    files = sorted(
        file for file in (shared_data / "trajectories").glob("*/*") if not file.name.startswith("SOURCE")
    )
    imported = tmp_path / "imported.jsonl"
    report = import_trajectories(files, imported)
    assert (report.refused, report.kept) == (0, 216)
    exported = tmp_path / f"{to}.jsonl"
    assert export_trajectories(read_imported(imported), to, exported).trajectories == 216
    back = tmp_path / "back.jsonl"
    assert import_trajectories([exported], back, format=to).kept == 216
    for before, after in zip(read_imported(imported), read_imported(back), strict=True):
        assert before == after


def test_atif_files_have_safe_and_different_names(tmp_path: Path) -> None:
    file, out = tmp_path / "t.jsonl", tmp_path / "out"
    ids = ["plain", "../a/b", "..:a:b", "a b", "a_b-2", "a_b", "A_B"]
    file.write_text(
        "".join(json.dumps({"id": i, "messages": [{"role": "assistant", "content": i}]}) + "\n" for i in ids)
    )
    assert export_trajectories(read_imported(file), "atif", out).files == len(ids)
    written = sorted(out.iterdir())
    assert len(written) == len(ids) and out / "plain.trajectory.json" in written
    assert {json.loads(each.read_text())["trajectory_id"] for each in written} == set(ids)
