"""Reading and writing OpenAI chat JSONL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.trajectory.importing import import_trajectories, read_file, read_imported
from megatron_klong.trajectory.interchange.openai_chat import OpenAIChat, write_openai_chat
from megatron_klong.trajectory.interchange.refusal import Refusal
from megatron_klong.trajectory.schema import Message, ToolCall, Trajectory

USER = {"role": "user", "content": "u"}
DONE = {"role": "assistant", "content": "a"}


def call(call_id: str | None = "c1", arguments: object = "{}") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "bash", "arguments": arguments}}


def acting(*calls: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": list(calls)}


def result(call_id: str | None) -> dict[str, Any]:
    return {"role": "tool", "content": "r", "tool_call_id": call_id}


def read(tmp_path: Path, *lines: bytes | dict[str, Any]) -> list[Trajectory | Refusal]:
    file = tmp_path / "chats.jsonl"
    file.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return list(read_file(file, OpenAIChat()))


@pytest.mark.parametrize(
    ("line", "field", "reason"),
    [
        (b'{"messages": [', "", "not JSON"),
        (b'{"messages": [{"role": "user", "content": "\xff"}]}', "", "not UTF-8 at byte 43"),
        ({"messages": [{"role": "user", "content": "\ud800"}, DONE]}, "", "half of a surrogate"),
        (b'{"messages": [], "reward": NaN}', "", "not JSON: NaN"),
        (b"[1]", "", "valid dictionary"),
        (b"[" * 100_000, "", "nested too deeply"),
        ({}, "messages", "required"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [USER]}, "messages", "no assistant message"),
        ({"messages": [USER, {"role": "robot", "content": "x"}]}, "messages.1.role", "'assistant'"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "messages.1.content", "string"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, DONE]},
            "messages.0.content",
            "content part of type 'image_url'",
        ),
        (
            {"messages": [USER, acting(call(arguments="{"))]},
            "messages.1.tool_calls.0.function.arguments",
            "not JSON",
        ),
        (
            {"messages": [USER, acting(call(arguments="[1]"))]},
            "messages.1.tool_calls.0.function.arguments",
            "not a JSON object",
        ),
        ({"messages": [USER, result("c1"), DONE]}, "messages.1.tool_call_id", "'c1' answers no call"),
        (
            {"messages": [USER, acting(call("c1")), result("c2")]},
            "messages.2.tool_call_id",
            "'c2' answers no call",
        ),
        (
            {"messages": [USER, acting(call("c1"), call("c1"))]},
            "messages.1.tool_calls.1.id",
            "'c1' is used twice",
        ),
        (
            {"messages": [{**USER, "tool_calls": [call()]}, DONE]},
            "messages.0.tool_calls",
            "only an assistant",
        ),
        ({"messages": [USER, DONE], "reward": "high"}, "reward", "number"),
        ({"messages": [USER, DONE], "reward": "nan"}, "reward", "finite"),
        ({"messages": [USER, DONE], "reward": float("1e999")}, "", "not JSON: Infinity"),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "reward": 1e999}', "reward", "finite"),
        (b'{"messages": [{"role": "assistant", "content": "a"}], "x": 1e999}', "", "JSON cannot hold"),
        (b'{"messages": [], "x": 1' + b"0" * 5000 + b"}", "", "not JSON"),
        (
            {"messages": [USER, acting(call(arguments='{"x": "\\ud800"}'))]},
            "",
            "half of a surrogate pair",
        ),
        ({"messages": [USER, acting(call(arguments='{"x": NaN}'))]}, "", "a number that JSON cannot hold"),
        ({"messages": [USER, DONE], "prefix_messages": 999}, "prefix_messages", "999 must end the initial"),
        (
            {"messages": [USER, USER, DONE], "prefix_messages": 1},
            "prefix_messages",
            "1 must end the initial messages",
        ),
        ({"messages": [USER, {"role": "assistant"}]}, "messages.1", "without content, reasoning or calls"),
    ],
)
def test_bad_records_are_refused_by_field(
    tmp_path: Path, line: bytes | dict[str, Any], field: str, reason: str
) -> None:
    good = {"messages": [USER, DONE]}
    before, refusal, after = read(tmp_path, good, line, good)
    assert isinstance(refusal, Refusal)
    assert (refusal.line, refusal.field) == (2, field)
    assert reason in refusal.reason
    assert isinstance(before, Trajectory)  # the rest goes on
    assert isinstance(after, Trajectory)


def test_nulls_and_a_byte_order_mark_are_nothing(tmp_path: Path) -> None:
    record = {
        "messages": [USER, {**DONE, "tool_calls": None, "context_only": None, "finish_reason": None}],
        "tools": None, "metadata": None, "id": None,
    }  # fmt: skip
    plain, marked = read(tmp_path, {"messages": [USER, DONE]}, b"\xef\xbb\xbf" + json.dumps(record).encode())
    assert isinstance(plain, Trajectory)
    assert isinstance(marked, Trajectory)
    assert marked.messages == plain.messages
    assert marked.metadata == {}


def test_a_second_record_of_an_id_is_refused(tmp_path: Path) -> None:
    record = {"id": 7, "messages": [USER, DONE]}
    first, second = read(tmp_path, record, record)
    assert isinstance(first, Trajectory)
    assert first.id == "7"
    assert isinstance(second, Refusal)
    assert (second.field, second.reason) == ("id", "'7' was used by an earlier record")


def test_normalises_and_loses_nothing(tmp_path: Path) -> None:
    record = {
        "task_id": 3,
        "harness": "h",
        "metadata": {"cost": 1.5},
        "tools": [{"type": "function", "function": {"name": "bash"}}],
        "messages": [
            {
                "role": "developer",
                "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "good"}],
            },
            {"role": "user", "content": "u", "name": "ann"},
            {"role": "assistant", "content": "demo", "weight": 0},
            {**acting({**call(arguments={"x": [1]}), "index": 0}), "finish_reason": "tool_calls"},
            {**result("c1"), "extra": {"ms": 5}},
            {"role": "assistant", "content": "cu", "finish_reason": "length"},
        ],
    }
    (trajectory,) = read(tmp_path, record)
    assert trajectory == Trajectory(
        id="chats-1",
        task_id="3",
        tools=({"type": "function", "function": {"name": "bash"}},),
        metadata={"cost": 1.5, "harness": "h"},
        messages=(
            Message("system", "be good", metadata={"source_role": "developer"}),
            Message("user", "u", metadata={"name": "ann"}),
            Message("assistant", "demo", context_only=True),
            Message(
                "assistant",
                tool_calls=(ToolCall("bash", {"x": [1]}, "c1", {"index": 0}),),
                metadata={"finish_reason": "tool_calls"},
            ),
            Message("tool", "r", tool_call_id="c1", metadata={"extra": {"ms": 5}}),
            Message("assistant", "cu", cut=True),
        ),
    )


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
extras = st.dictionaries(st.sampled_from(["name", "extra", "ünknown"]), json_values, max_size=2)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    messages = draw(
        st.lists(st.builds(Message, st.sampled_from(["system", "user"]), st.text(max_size=5)), max_size=3)
    )
    for turn in range(draw(st.integers(1, 4))):
        names = [f"call-{turn}-{index}" for index in range(draw(st.integers(0, 2)))]
        made = tuple(
            ToolCall(
                "t",
                draw(st.dictionaries(st.text(max_size=3), json_values, max_size=2)),
                name,
                draw(st.sampled_from([{}, {"index": 1}, {"function": {"id": "x"}}])),
            )
            for name in names
        )
        messages.append(
            Message(
                "assistant",
                draw(st.text(min_size=1, max_size=9)),
                draw(st.none() | st.text(max_size=9)),
                made,
                context_only=draw(st.booleans()),
                cut=draw(st.booleans()),
                metadata=draw(extras),
            )
        )
        messages += [Message("tool", draw(st.text(max_size=5)), tool_call_id=name) for name in names]
    ends = [index for index, message in enumerate(messages) if message.role == "assistant"]
    return Trajectory(
        id=draw(st.text(min_size=1, max_size=5)),
        messages=tuple(messages),
        tools=tuple(
            draw(st.lists(st.dictionaries(st.text(max_size=3), json_values, max_size=2), max_size=2))
        ),
        task_id=draw(st.none() | st.text(max_size=5)),
        reward=draw(st.none() | st.floats(allow_nan=False, allow_infinity=False)),
        prefix_messages=draw(st.none() | st.sampled_from([*ends, len(messages)])),
        metadata=draw(extras),
    )


@settings(max_examples=200, deadline=None)
@given(trajectory=trajectories())
def test_reading_what_was_written_gives_an_equal_record(
    tmp_path_factory: pytest.TempPathFactory, trajectory: Trajectory
) -> None:
    file = tmp_path_factory.mktemp("chat") / "chats.jsonl"
    file.write_text(write_openai_chat(trajectory) + "\n", encoding="utf-8")
    assert list(read_file(file, OpenAIChat())) == [trajectory]


@settings(max_examples=200, deadline=None)
@given(garbage=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()))
def test_the_reader_never_raises(tmp_path_factory: pytest.TempPathFactory, garbage: bytes) -> None:
    file = tmp_path_factory.mktemp("fuzz") / "chats.jsonl"
    file.write_bytes(garbage)
    found = list(read_file(file, OpenAIChat()))
    assert len(found) == sum(bool(line.strip()) for line in garbage.split(b"\n"))


def test_import_keeps_quarantines_and_reports(tmp_path: Path) -> None:
    first, second, out = tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "out" / "all.jsonl"
    good = {"id": "g", "messages": [USER, DONE, USER, DONE]}
    first.write_text(json.dumps(good) + "\n{broken\n\n")
    second.write_text(json.dumps(good) + "\n" + json.dumps({"messages": [USER, DONE]}) + "\n")
    report = import_trajectories([first, second], out)
    assert (report.read, report.kept, report.refused) == (4, 2, 2)
    assert (report.messages, report.assistant_messages) == (6, 3)
    assert [item.id for item in read_imported(out)] == ["g", "b-2"]
    quarantined = [json.loads(line) for line in Path(str(report.quarantine)).read_text().splitlines()]
    assert [(Path(item["file"]).name, item["line"], item["field"]) for item in quarantined] == [
        ("a.jsonl", 2, ""),
        ("b.jsonl", 1, "id"),
    ]
    assert quarantined[0]["raw"] == "{broken"
    assert report.refusals[0].startswith(f"{first}:2: not JSON")
    assert sorted(path.name for path in out.parent.iterdir()) == ["all.jsonl", "all.jsonl.quarantine.jsonl"]
    # A clean import takes an old quarantine file away.
    second.write_text("")
    first.write_text(json.dumps(good) + "\n")
    assert import_trajectories([first, second], out).quarantine is None
    assert sorted(path.name for path in out.parent.iterdir()) == ["all.jsonl"]


def test_import_refuses_to_overwrite_its_input_and_names_missing_files(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"messages": [USER, DONE]}) + "\n")
    with pytest.raises(ValueError, match="is also an input"):
        import_trajectories([file], file)
    quarantined = tmp_path / "a.jsonl.quarantine.jsonl"
    file.rename(quarantined)
    with pytest.raises(ValueError, match="is also an input"):
        import_trajectories([quarantined], file)
    quarantined.rename(file)
    with pytest.raises(ValueError, match=r"none\.jsonl: No such file"):
        import_trajectories([tmp_path / "none.jsonl"], tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_files_of_one_name_do_not_refuse_each_others_records(tmp_path: Path) -> None:
    files = [tmp_path / folder / "chats.jsonl" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_text(json.dumps({"messages": [USER, DONE]}) + "\n")
    assert import_trajectories(files, tmp_path / "all.jsonl").kept == 2
    assert [item.id for item in read_imported(tmp_path / "all.jsonl")] == ["chats-1-1", "chats-2-1"]
