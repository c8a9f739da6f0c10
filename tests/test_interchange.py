"""Reading other harnesses' files, and writing them back."""

from __future__ import annotations

import copy
import json
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_klong.cli.data import FORMATS
from megatron_klong.trajectory.importing import import_trajectories, read_file
from megatron_klong.trajectory.interchange import READERS, reader_of
from megatron_klong.trajectory.interchange.refusal import Refusal
from megatron_klong.trajectory.schema import Message, ToolCall, Trajectory
from tests.test_openai_chat import json_values

Found = list[Trajectory | Refusal]


def read(tmp_path: Path, name: str, value: Any, file_name: str = "run.json") -> Found:
    """What a reader makes of a document (or of lines, given as a list for a .jsonl file)."""
    file = tmp_path / file_name
    if file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(each) + "\n" for each in value))
    else:
        file.write_text(json.dumps(value))
    assert reader_of(file, "auto").name == name
    return list(read_file(file, READERS[name]))


def only(found: Found) -> Trajectory:
    (trajectory,) = found
    assert isinstance(trajectory, Trajectory), trajectory
    return trajectory


def calling(*calls: tuple[str, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for call_id, name, arguments in calls
    ]


def shown(message: Message) -> tuple[str, str | None, tuple[str | None, ...], str | None]:
    return message.role, message.content, tuple(call.id for call in message.tool_calls), message.tool_call_id


# Each format by hand


ATIF: dict[str, Any] = {
    "schema_version": "ATIF-v1.5",
    "session_id": "s",
    "agent": {"name": "a", "version": "1", "tool_definitions": [{"type": "function"}]},
    "steps": [
        {"step_id": 1, "source": "system", "message": "be good"},
        {"step_id": 2, "source": "user", "message": [{"type": "text", "text": "do"}]},
        {"step_id": 3, "source": "agent", "message": "copied", "is_copied_context": True},
        {"step_id": 4, "source": "agent", "message": "no model", "llm_call_count": 0},
        {
            "step_id": 5, "source": "agent", "message": "m", "reasoning_content": "r",
            "tool_calls": [
                {"tool_call_id": "c1", "function_name": "f", "arguments": {"x": 1}},
                {"tool_call_id": "c2", "function_name": "g", "arguments": {}},
            ],
            "observation": {"results": [
                {"source_call_id": "c1", "content": "o1"},
                {"content": "o2"},
                {"subagent_trajectory_ref": [{"trajectory_path": "p"}]},
            ]},
            "metrics": {"completion_token_ids": [5, 6], "logprobs": [-0.1, -0.2]},
        },
        {"step_id": 6, "source": "agent", "message": "text",
         "observation": {"results": [{"content": "screen"}]}},
    ],
    "subagent_trajectories": [
        {"schema_version": "ATIF-v1.7", "trajectory_id": "sub", "agent": {"name": "b", "version": "2"},
         "steps": [{"step_id": 1, "source": "agent", "message": "hi"}]},
    ],
}  # fmt: skip


def test_atif(tmp_path: Path) -> None:
    main, subagent = read(tmp_path, "atif", ATIF)
    silent = {"subagent_trajectory_ref": [{"trajectory_path": "p"}]}
    assert main == Trajectory(
        id="run",
        tools=({"type": "function"},),
        metadata={
            "atif": {"session_id": "s", "agent": {"name": "a", "version": "1"}, "schema_version": "ATIF-v1.5"}
        },
        messages=(
            Message("system", "be good"),
            Message("user", "do"),
            Message("assistant", "copied", context_only=True),
            Message("assistant", "no model", context_only=True, metadata={"step": {"llm_call_count": 0}}),
            Message(
                "assistant", "m", "r", (ToolCall("f", {"x": 1}, "c1"), ToolCall("g", {}, "c2")),
                metadata={
                    "step": {
                        "metrics": {"completion_token_ids": [5, 6], "logprobs": [-0.1, -0.2]},
                        "results_without_content": [silent],
                    }
                },
            ),
            Message("tool", "o1", tool_call_id="c1"),
            Message("tool", "o2", tool_call_id="c2"),
            Message("assistant", "text"),
            Message("user", "screen"),
        ),
    )  # fmt: skip
    assert isinstance(subagent, Trajectory)
    assert (subagent.id, subagent.messages) == ("sub", (Message("assistant", "hi"),))


def test_sharegpt(tmp_path: Path) -> None:
    record = {
        "system": "be good", "tools": '[{"name": "f"}]', "source": "x",
        "conversations": [
            {"from": "human", "value": "do"},
            {"from": "function_call", "value": '[{"name": "f", "arguments": {"x": 1}}, {"name": "g"}]'},
            {"from": "observation", "value": "o1"},
            {"from": "observation", "value": "o2"},
            {"from": "gpt", "value": "done", "weight": 0},
            {"from": "human", "value": "more"},
            {"from": "gpt", "value": "ok"},
        ],
    }  # fmt: skip
    calls = (
        ToolCall("f", {"x": 1}, "conversations.1.0"),
        ToolCall("g", {}, "conversations.1.1"),
    )
    expected = Trajectory(
        id="chat-1",
        tools=({"name": "f"},),
        metadata={"source": "x"},
        messages=(
            Message("system", "be good"),
            Message("user", "do"),
            Message("assistant", tool_calls=calls),
            Message("tool", "o1", tool_call_id="conversations.1.0"),
            Message("tool", "o2", tool_call_id="conversations.1.1"),
            Message("assistant", "done", context_only=True),
            Message("user", "more"),
            Message("assistant", "ok"),
        ),
    )
    assert only(read(tmp_path, "sharegpt", [record], "chat.jsonl")) == expected
    (item,) = read(tmp_path, "sharegpt", [record], "chat.json")  # LLaMA-Factory's files are arrays
    assert isinstance(item, Trajectory) and item.messages == expected.messages


def test_swe_agent(tmp_path: Path) -> None:
    history = [
        {"role": "system", "content": "s", "agent": "main"},
        {"role": "user", "content": "demo", "is_demo": True},
        {"role": "assistant", "content": "demo", "thought": "t", "action": "ls", "is_demo": True},
        {"role": "user", "content": [{"type": "text", "text": "do"}]},
        {"role": "assistant", "content": "look", "tool_calls": calling(("c1", "bash", {"command": "ls"})),
         "thinking_blocks": [{"type": "thinking", "thinking": "hm"}]},
        {"role": "tool", "content": [{"type": "text", "text": "a b"}], "tool_call_ids": ["c1"]},
        {"role": "assistant", "content": "Exit due to cost limit", "thought": "Exit due to cost limit",
         "action": "exit_cost"},
    ]  # fmt: skip
    steps = [{"action": "ls", "state": {"cwd": "/"}, "query": [{"role": "system"}], "messages": [1]}]
    trajectory = only(
        read(tmp_path, "swe-agent", {"history": history, "trajectory": steps, "environment": "e", "info": {}},
             "run.traj")
    )  # fmt: skip
    assert trajectory.task_id == "e"
    assert trajectory.metadata == {"info": {}, "trajectory": [{"action": "ls", "state": {"cwd": "/"}}]}
    roles = [message.role for message in trajectory.messages]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool", "assistant"]
    assert [m.context_only for m in trajectory.messages] == [False, True, True, False, False, False, True]
    action, result = trajectory.messages[4:6]
    assert (action.reasoning_content, action.tool_calls[0].arguments) == ("hm", {"command": "ls"})
    assert (result.content, result.tool_call_id) == ("a b", "c1")
    assert trajectory.messages[2].metadata["action"] == "ls"


@pytest.mark.parametrize("called", [True, False])
def test_mini_swe_agent(tmp_path: Path, called: bool) -> None:
    """The closing message of role exit answers the call that has no result, or is a user's."""
    said: dict[str, Any] = {"role": "assistant", "content": "m", "extra": {"cost": 1}}
    if called:
        said["tool_calls"] = calling(("c1", "bash", {}), ("c2", "bash", {}))
    messages = [
        {"role": "user", "content": "do"},
        said,
        *([{"role": "tool", "content": "r", "tool_call_id": "c1"}] if called else []),
        {"role": "exit", "content": "patch", "extra": {"exit_status": "Submitted"}},
    ]
    raw = {"info": {"exit_status": "Submitted"}, "messages": messages, "instance_id": "i",
           "trajectory_format": "mini-swe-agent-1.1"}  # fmt: skip
    trajectory = only(read(tmp_path, "mini-swe-agent", raw, "i.traj.json"))
    last = trajectory.messages[-1]
    assert (last.role, last.content, last.tool_call_id) == (
        "tool" if called else "user", "patch", "c2" if called else None,
    )  # fmt: skip
    assert last.metadata == {"source_role": "exit", "extra": {"exit_status": "Submitted"}}
    assert trajectory.id == trajectory.task_id == "i"  # by the file's name, and by instance_id
    assert trajectory.metadata["info"] == {"exit_status": "Submitted"}


def model_answer(answer_id: str, content: str, *calls: tuple[str, str, dict[str, Any]]) -> dict[str, Any]:
    return {"id": answer_id, "choices": [{"message": {"role": "assistant", "content": content,
                                                      "tool_calls": calling(*calls)}}]}  # fmt: skip


def test_openhands_v0(tmp_path: Path) -> None:
    both = model_answer("r1", "look", ("c1", "execute_bash", {"command": "ls"}), ("c2", "think", {}))
    history = [
        {"id": 0, "source": "agent", "action": "system",
         "args": {"content": "s", "tools": [{"type": "function"}]}},
        {"id": 1, "source": "user", "action": "message", "args": {"content": "do"}},
        {"id": 2, "source": "user", "action": "recall", "args": {"query": "do"}},
        {"id": 4, "source": "environment", "observation": "recall", "content": "Added", "cause": 2,
         "extras": {"repo_instructions": "", "microagent_knowledge": [{"content": "use make"}]}},
        {"id": 5, "source": "agent", "action": "run", "args": {"command": "ls"},
         "tool_call_metadata": {"tool_call_id": "c1", "model_response": both}},
        {"id": 7, "source": "agent", "action": "think", "args": {},
         "tool_call_metadata": {"tool_call_id": "c2", "model_response": both}},
        {"id": 9, "source": "agent", "observation": "think", "content": "logged", "cause": 7},
        {"id": 10, "source": "agent", "observation": "run", "content": "a b", "cause": 5},
        {"id": 11, "source": "agent", "action": "run", "args": {"command": "pwd", "thought": "where"}},
        {"id": 12, "source": "agent", "observation": "run", "content": "/", "cause": 11},
        {"id": 13, "source": "agent", "action": "message", "args": {"content": "done"}},
        {"id": 14, "source": "environment", "observation": "error", "content": "limit"},
    ]  # fmt: skip
    trajectory = only(
        read(tmp_path, "openhands-v0",
             [{"instance_id": "i", "history": history, "test_result": {}, "error": None}], "output.jsonl")
    )  # fmt: skip
    shown = [
        (m.role, m.content, tuple(c.id for c in m.tool_calls), m.tool_call_id) for m in trajectory.messages
    ]
    assert shown == [
        ("system", "s", (), None),
        ("user", "do", (), None),
        ("user", "Added\n\nuse make", (), None),
        ("assistant", "look", ("c1", "c2"), None),
        ("tool", "logged", (), "c2"),
        ("tool", "a b", (), "c1"),
        ("assistant", "where", ("event-11",), None),
        ("tool", "/", (), "event-11"),
        ("assistant", "done", (), None),
        ("user", "limit", (), None),
    ]
    assert trajectory.tools == ({"type": "function"},)
    assert [event["id"] for event in trajectory.metadata["events"]] == [2]
    assert trajectory.messages[6].tool_calls[0] == ToolCall("run", {"command": "pwd"}, "event-11")


def test_openhands_v1(tmp_path: Path) -> None:
    text = lambda value: [{"type": "text", "text": value}]  # noqa: E731
    events = [
        {"kind": "SystemPromptEvent", "id": "0", "source": "agent", "system_prompt": {"text": "s"},
         "tools": [{"type": "function"}]},
        {"kind": "MessageEvent", "id": "1", "source": "user",
         "llm_message": {"role": "user", "content": text("do")}, "extended_content": text("!")},
        {"kind": "ActionEvent", "id": "2", "source": "agent", "thought": text("look"),
         "reasoning_content": "r", "tool_call_id": "c1", "llm_response_id": "R",
         "tool_call": {"id": "c1", "name": "f", "arguments": '{"x": 1}'}},
        {"kind": "ActionEvent", "id": "3", "source": "agent", "thought": [],
         "tool_call": {"id": "c2", "name": "g", "arguments": "{}"}, "llm_response_id": "R"},
        {"kind": "ObservationEvent", "id": "4", "source": "environment", "tool_call_id": "c1",
         "observation": {"content": text("bad"), "is_error": True}},
        {"kind": "AgentErrorEvent", "id": "5", "source": "agent", "tool_call_id": "c2", "error": "no"},
        {"kind": "ConversationStateUpdateEvent", "id": "6", "source": "environment", "key": "k"},
        {"kind": "ObservationEvent", "id": "7", "source": "environment", "tool_call_id": "lost",
         "observation": {"content": text("orphan")}},
    ]  # fmt: skip
    trajectory = only(read(tmp_path, "openhands-v1", events, "events.jsonl"))
    shown = [
        (m.role, m.content, tuple(c.id for c in m.tool_calls), m.tool_call_id) for m in trajectory.messages
    ]
    assert shown == [
        ("system", "s", (), None),
        ("user", "do!", (), None),
        ("assistant", "look", ("c1", "c2"), None),
        ("tool", "[An error occurred during execution.]\nbad", (), "c1"),
        ("tool", "no", (), "c2"),
        ("user", "orphan", (), None),
    ]
    assert trajectory.messages[2].reasoning_content == "r"
    assert [event["id"] for event in trajectory.metadata["events"]] == ["6"]


INSPECT = {
    "version": 2, "eval": {"task": "browse"},
    "samples": [
        {
            "id": 1, "epoch": 2, "input": "x", "scores": {"match": {"value": "C"}},
            "attachments": {"0" * 32: "a long text"},
            "events": [{"event": "model", "tools": [{"name": "go", "description": "d", "parameters": {},
                                                     "options": 1}]}],
            "messages": [
                {"role": "user", "content": "attachment://" + "0" * 32, "source": "input"},
                {"role": "assistant",
                 "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "go"}],
                 "tool_calls": [{"id": "c", "function": "go", "arguments": {"url": "u"}}]},
                {"role": "tool", "content": "", "tool_call_id": "c", "function": "go",
                 "error": {"type": "timeout", "message": "Command timed out"}},
            ],
        },
        {"id": "b", "messages": [{"role": "user", "content": [{"type": "image", "image": "i"}]}]},
    ],
}  # fmt: skip


def check_inspect(found: Found) -> None:
    good, bad = found
    assert isinstance(good, Trajectory)
    assert (good.id, good.task_id, good.reward) == ("browse-1-2", "browse-1", 1.0)
    assert good.tools == (
        {"type": "function", "function": {"name": "go", "description": "d", "parameters": {}}},
    )
    user, action, result = good.messages
    assert user.content == "a long text"
    assert (action.content, action.reasoning_content) == ("go", "hm")
    assert action.tool_calls == (ToolCall("go", {"url": "u"}, "c"),)
    assert (result.tool_call_id, result.content) == ("c", "Error: Command timed out")  # as the model saw it
    assert result.metadata["error"]["type"] == "timeout"
    assert isinstance(bad, Refusal)
    assert bad.field == "messages.0.content" and "type 'image'" in bad.reason


def test_inspect_json(tmp_path: Path) -> None:
    found = read(tmp_path, "inspect", INSPECT)
    check_inspect(found)
    assert isinstance(found[1], Refusal) and found[1].record == "samples.1"


@pytest.mark.parametrize("packing", ["deflate", "zstandard"])
def test_inspect_eval(tmp_path: Path, packing: str) -> None:
    file = tmp_path / "log.eval"
    members = {"header.json": {"eval": INSPECT["eval"]}, "summaries.json": []}
    members |= {f"samples/{s['id']}_epoch_1.json": s for s in INSPECT["samples"]}  # type: ignore[index,attr-defined]
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED if packing == "deflate" else 0) as archive:
        for name, value in members.items():
            content = json.dumps(value).encode()
            if packing == "zstandard":
                half = len(content) // 2
                content = b"".join(zstandard.compress(part) for part in (content[:half], content[half:]))
            archive.writestr(name, content)
    if packing == "zstandard":
        mark_as_zstandard(file)
    assert reader_of(file, "auto").name == "inspect"
    check_inspect(list(read_file(file, READERS["inspect"])))


def mark_as_zstandard(file: Path) -> None:
    """Stored members hold what is packed already: say so in both headers of each."""
    content = bytearray(file.read_bytes())
    for signature, place in ((b"PK\x03\x04", 8), (b"PK\x01\x02", 10)):
        at = content.find(signature)
        while at >= 0:
            struct.pack_into("<H", content, at + place, 93)
            at = content.find(signature, at + 4)
    file.write_bytes(content)


def test_a_damaged_archive_is_refused_by_member(tmp_path: Path) -> None:
    file = tmp_path / "log.eval"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("header.json", "{}")
        archive.writestr("samples/1_epoch_1.json", json.dumps(INSPECT["samples"][0]))  # type: ignore[index]
        archive.writestr("samples/2_epoch_1.json", "{broken")
    content = file.read_bytes().replace(b"a long text", b"a lonG text")  # its checksum is wrong now
    file.write_bytes(content)
    first, second = read_file(file, READERS["inspect"])
    assert isinstance(first, Refusal) and isinstance(second, Refusal)
    assert first.record == "samples/1_epoch_1.json" and "Bad CRC-32" in first.reason
    assert second.reason.startswith("not JSON")


def test_tau_bench(tmp_path: Path) -> None:
    run = {"task_id": 3, "trial": 0, "reward": 1.0, "info": {}, "traj": [
        {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]}  # fmt: skip
    trajectory = only(read(tmp_path, "tau-bench", [run]))
    assert (trajectory.id, trajectory.task_id, trajectory.reward) == ("run-0", "3", 1.0)
    assert trajectory.metadata == {"info": {}, "trial": 0}


# Bad input


def change(value: Any, *path: str | int, to: Any) -> Any:
    """A copy with one place changed."""
    copied = copy.deepcopy(value)
    place = copied
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return copied


@pytest.mark.parametrize(
    ("name", "value", "field", "reason"),
    [
        ("atif", change(ATIF, "steps", 3, "source", to="robot"), "steps.3.source", "'user' or 'agent'"),
        ("atif", change(ATIF, "steps", 1, "message", 0, "type", to="image"), "steps.1.message",
         "type 'image'"),
        ("atif", change(ATIF, "schema_version", to="ATIF-v2.0"), "schema_version", "match pattern"),
        ("atif", change(ATIF, "steps", 4, "tool_calls", 1, "tool_call_id", to="c1"), "steps.4.tool_calls",
         "used twice"),
        ("atif", change(ATIF, "steps", 4, "observation", "results", 0, "source_call_id", to="c9"),
         "steps.4.tool_call_id", "'c9' answers no call"),
        ("atif", {**ATIF, "steps": []}, "steps", "at least 1"),
        ("sharegpt", {"conversations": [{"from": "robot", "value": "x"}]}, "conversations.0.from", "robot"),
        ("sharegpt", {"conversations": [{"from": "observation", "value": "x"}]}, "conversations.0.from",
         "answers no call"),
        ("sharegpt", {"conversations": [{"from": "function_call", "value": "x"}]}, "conversations.0.value",
         "no JSON"),
        ("sharegpt", {"conversations": [{"from": "human", "value": "x"}]}, "messages", "no assistant"),
        ("swe-agent", {"history": [{"role": "tool", "content": "x", "tool_call_ids": ["c"]},
                                   {"role": "assistant", "content": "a"}], "trajectory": []},
         "history.0.tool_call_id", "'c' answers no call"),
        ("mini-swe-agent", {"info": {}, "messages": [{"role": "robot"}]}, "messages.0.role", "'assistant'"),
        ("openhands-v0", {"instance_id": "i", "history": [{"id": "x"}]}, "history.0.id", "integer"),
        ("inspect", change(INSPECT, "samples", to=[{"id": 1, "messages": []}]), "messages", "at least 1"),
    ],
)  # fmt: skip
def test_bad_records_are_refused_by_field(
    tmp_path: Path, name: str, value: Any, field: str, reason: str
) -> None:
    refusal = read(tmp_path, name, value)[0]
    assert isinstance(refusal, Refusal)
    assert refusal.field == field
    assert reason in refusal.reason
    assert json.loads(refusal.raw)  # all of it is in the quarantine


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inspect", change(INSPECT, "samples", 0, "events", 0, "tools", to=5)),
        ("inspect", change(INSPECT, "samples", 0, "messages", 0, "content", to="\ud800")),
        ("openhands-v0", {"instance_id": "i", "history": [
            {"id": 0, "source": "agent", "action": "system", "args": {"content": "s", "tools": 5}}]}),
        ("openhands-v1", [{"kind": "ActionEvent", "id": "\ud800", "source": "agent"}]),
    ],
)  # fmt: skip
def test_odd_records_go_to_quarantine_and_end_nothing(tmp_path: Path, name: str, value: Any) -> None:
    file = tmp_path / "x.json"
    file.write_text(json.dumps(value))
    good = tmp_path / "good.jsonl"
    good.write_text('{"messages": [{"role": "assistant", "content": "a"}]}\n')
    report = import_trajectories([file, good], tmp_path / "out.jsonl", format="auto")
    assert report.kept >= 1 and report.formats["openai"] == 1
    if report.quarantine:
        lines = Path(report.quarantine).read_text().splitlines()
        assert len(lines) == report.refused and all(json.loads(line)["reason"] for line in lines)
    assert name in READERS


def test_deep_nesting_is_refused(tmp_path: Path) -> None:
    deep = "[" * 5000 + "]" * 5000
    record = '[{"messages": [{"role": "assistant", "content": "a"}], "x": DEEP}]'
    (tmp_path / "a.json").write_text(record.replace("DEEP", deep))
    (tmp_path / "b.json").write_text('{"messages":' * 5_000)
    report = import_trajectories([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "out.jsonl")
    assert (report.kept, report.refused) == (0, 2)


def test_a_damaged_deflate_member_and_an_odd_header_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "log.eval"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("samples/1_epoch_1.json", json.dumps(INSPECT["samples"][0]) * 50)  # type: ignore[index]
    content = bytearray(file.read_bytes())
    content[60:80] = b"\xff" * 20
    file.write_bytes(content)
    (refusal,) = read_file(file, READERS["inspect"])
    assert isinstance(refusal, Refusal) and "damaged" in refusal.reason
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("header.json", '{"eval": 5}')
    (refusal,) = read_file(file, READERS["inspect"])
    assert isinstance(refusal, Refusal) and "damaged archive" in refusal.reason


def test_runs_of_one_task_do_not_refuse_each_other(tmp_path: Path) -> None:
    raw = {"info": {}, "instance_id": "same", "trajectory_format": "mini-swe-agent-1.1",
           "messages": [{"role": "assistant", "content": "a"}]}  # fmt: skip
    for name in ("a.traj.json", "b.traj.json"):
        (tmp_path / name).write_text(json.dumps(raw))
    assert import_trajectories(sorted(tmp_path.iterdir()), tmp_path / "out.jsonl").kept == 2


def test_openai_rows_with_info_are_openai(tmp_path: Path) -> None:
    row = {"id": "mine", "reward": 1.0, "tools": [{"type": "function"}], "info": {},
           "messages": [{"role": "assistant", "content": "a"}]}  # fmt: skip
    trajectory = only(read(tmp_path, "openai", [row], "rows.jsonl"))
    assert (trajectory.id, trajectory.reward, trajectory.tools) == ("mine", 1.0, ({"type": "function"},))


def test_lines_are_lines_whatever_the_file_is_called(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "x" * 100_000}, {"role": "assistant", "content": "a"}]}
    (tmp_path / "rows.txt").write_text((json.dumps(row) + "\n") * 3)
    assert len(list(read_file(tmp_path / "rows.txt", reader_of(tmp_path / "rows.txt", "auto")))) == 3


def test_subagents_of_several_lines_have_ids_of_their_own(tmp_path: Path) -> None:
    inner = change(ATIF, "subagent_trajectories", to=[])
    twice = change(ATIF, "subagent_trajectories", to=[inner, inner])
    found = read(tmp_path, "atif", [twice, twice], "runs.jsonl")
    assert len({item.id for item in found if isinstance(item, Trajectory)}) == 6


def test_a_message_of_ten_megabytes_is_a_message(tmp_path: Path) -> None:
    long = "x" * 10_000_000
    record = {"messages": [{"role": "user", "content": long}, {"role": "assistant", "content": "y"}]}
    assert only(read(tmp_path, "openai", [record], "chat.jsonl")).messages[0].content == long
    assert only(read(tmp_path, "openai", record)).messages[0].content == long  # also as a document


def test_a_truncated_document_keeps_what_came_before(tmp_path: Path) -> None:
    file = tmp_path / "log.json"
    whole = json.dumps(change(INSPECT, "samples", 1, to=change(INSPECT["samples"], 0, "id", to=2)[0]))  # type: ignore[index]
    file.write_text(whole[:-40])
    good, cut = read_file(file, reader_of(file, "auto"))
    assert isinstance(good, Trajectory)
    assert isinstance(cut, Refusal) and cut.record == "samples.1" and "not JSON" in cut.reason


def test_a_file_of_no_known_format_is_told(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('{"a": 1, "b": 2}')
    with pytest.raises(ValueError, match=r"x\.json: of no known format \(its first record has a, b\)"):
        import_trajectories([file], tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match="--format foo: there are auto, atif"):
        import_trajectories([file], tmp_path / "out.jsonl", format="foo")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json"]


EXAMPLES = {
    "atif": ATIF,
    "inspect": INSPECT,
    "sharegpt": [{"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}],
    "tau-bench": [{"traj": [{"role": "assistant", "content": "a"}], "reward": 1}],
    "swe-agent": {"history": [{"role": "assistant", "content": "a", "tool_call_ids": ["x"]}],
                  "trajectory": [{}]},
    "mini-swe-agent": {"info": {}, "messages": [{"role": "assistant", "content": "a"}, {"role": "exit"}]},
    "openhands-v0": {"instance_id": "i", "history": [
        {"id": 1, "source": "agent", "action": "run", "args": {"thought": "t"},
         "tool_call_metadata": {"tool_call_id": "c",
                                "model_response": model_answer("r", "x", ("c", "f", {}))}},
        {"id": 2, "observation": "run", "content": "o", "cause": 1}]},
    "openhands-v1": [{"kind": "ActionEvent", "id": "2", "source": "agent",
                      "thought": [{"type": "text", "text": "t"}],
                      "tool_call": {"id": "c", "name": "f", "arguments": "{}"}, "llm_response_id": "R"}],
    "openai": [{"messages": [{"role": "assistant", "content": "a"}]}],
}  # fmt: skip


def places(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    children: Any = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, item in children:
        yield (*path, key)
        yield from places(item, (*path, key))


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_reader_raises_or_loses_a_record(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """With any one place replaced by any JSON, a record is read or refused."""
    value: Any = EXAMPLES[name]
    changed = change(value, *data.draw(st.sampled_from(list(places(value)))), to=data.draw(json_values))
    file = tmp_path / "x.json"
    file.write_text(json.dumps(changed))
    found = list(read_file(file, READERS[name]))
    assert found or name == "inspect"  # whose samples may have been what was replaced
    assert all(isinstance(item, Trajectory | Refusal) for item in found)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=60))
def test_no_reader_raises_on_garbage(tmp_path: Path, name: str, garbage: bytes) -> None:
    file = tmp_path / "x.json"
    file.write_bytes(garbage)
    assert all(isinstance(item, Refusal) for item in read_file(file, READERS[name]))


def test_the_help_names_all_formats() -> None:
    assert set(FORMATS.split(", ")) == set(READERS)


# Real files: nothing is lost


def test_real_files_lose_no_message(shared_data: Path) -> None:
    folder = shared_data / "trajectories"
    for file, messages in sources(folder):
        found = list(read_file(file, reader_of(file, "auto")))
        assert len(found) == len(messages), file
        for item, texts in zip(found, messages):
            assert isinstance(item, Trajectory), item
            kept = [text for message in item.messages for text in texts_of(message)]
            for text in texts:
                assert any(text in each for each in kept), (file, text[:80])


def texts_of(message: Message) -> list[str]:
    arguments = [value for call in message.tool_calls for value in call.arguments.values()]
    return [message.content or "", message.reasoning_content or "", *(str(value) for value in arguments)]


def sources(folder: Path) -> Iterator[tuple[Path, list[list[str]]]]:
    """Every file with the texts of its conversations, gathered by the words of its schema."""
    for file in (folder / "swe-agent").glob("*.traj"):
        yield file, [[item["content"] for item in json.loads(file.read_text())["history"]]]
    for file in (folder / "swe-smith").glob("*.traj"):
        yield file, [[_text(item["content"]) for item in json.loads(file.read_text())["history"]]]
    for file in (folder / "swe-smith").glob("*.jsonl"):
        yield file, [[_text(m["content"]) for m in json.loads(line)["messages"]] for line in file.open()]
    for file in (folder / "mini-swe-agent").glob("*.json"):
        yield file, [[m["content"] or "" for m in json.loads(file.read_text())["messages"]]]
    for file in (folder / "tau-bench").glob("*.json"):
        yield file, [[m["content"] or "" for m in run["traj"]] for run in json.loads(file.read_text())]
    for file in (folder / "inspect-ai").glob("*.json"):
        samples = json.loads(file.read_text())["samples"]
        yield file, [[m["content"] for m in sample["messages"]] for sample in samples]
    for file in (folder / "atif").glob("*.json"):
        steps = json.loads(file.read_text())["steps"]
        results = [r for s in steps for r in s.get("observation", {}).get("results", ())]
        yield file, [[s["message"] for s in steps] + [r["content"] for r in results if "content" in r]]
    v0 = folder / "openhands" / "v0_output.jsonl"
    yield v0, [_openhands_v0(json.loads(line)["history"]) for line in v0.open()]
    v1 = folder / "openhands" / "v1_sdk_events.jsonl"
    events = [json.loads(line) for line in v1.open()]
    texts = [part["text"] for e in events for part in e.get("thought", [])]
    texts += [part["text"] for e in events for part in e.get("observation", {}).get("content", [])]
    yield v1, [texts + [e["reasoning_content"] for e in events if e.get("reasoning_content")]]


def _openhands_v0(history: list[dict[str, Any]]) -> list[str]:
    texts = [e["content"] for e in history if "observation" in e]
    texts += [k["content"] for e in history if e.get("observation") == "recall"
              for k in e["extras"]["microagent_knowledge"]]  # fmt: skip
    for event in history:
        if event.get("action") in ("system", "message"):
            texts.append(event["args"]["content"])
        elif "action" in event and "tool_call_metadata" in event:
            choices = event["tool_call_metadata"]["model_response"]["choices"]
            texts.append(choices[0]["message"]["content"] or "")
    return texts


def _text(content: str | list[dict[str, str]]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
