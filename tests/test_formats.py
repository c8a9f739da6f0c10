"""Rendering against the published chat templates, and what the templates cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from megatron_klong.trajectory.formats import FORMATS
from megatron_klong.trajectory.render import Renderer, load_renderer
from megatron_klong.trajectory.schema import Message, ToolCall, Trajectory
from megatron_klong.trajectory.tokenizer import phrase_tokenizer, save_tokenizer

TEMPLATES = {"glm-4.5": "GLM-4.6.jinja", "qwen3": "Qwen-Qwen3-0.6B.jinja"}

TOOL = {"type": "function", "function": {"name": "läs", "description": "Læs <b>", "parameters": {}}}

text = st.text(st.sampled_from("ab \n7ü{}\"'"), max_size=12)
values = st.one_of(text, st.integers(-5, 5), st.booleans(), st.none(), st.lists(st.integers(), max_size=2))
calls = st.builds(
    ToolCall,
    name=st.sampled_from(["bash", "read"]),
    arguments=st.dictionaries(st.sampled_from("xyz"), values),
)
thoughts = st.one_of(st.none(), text)


@st.composite
def conversations(draw: st.DrawFn) -> Trajectory:
    """One user message; every action but the last calls tools, whose results answer it."""
    messages = [Message("system", draw(text))] if draw(st.booleans()) else []
    messages.append(Message("user", draw(text)))
    for _ in range(draw(st.integers(0, 4))):
        made = tuple(draw(st.lists(calls, min_size=1, max_size=3)))
        messages.append(Message("assistant", draw(text), draw(thoughts), made))
        messages += [Message("tool", draw(text)) for _ in made]
    if len(messages) < 3 or draw(st.booleans()):
        messages.append(Message("assistant", draw(text), draw(thoughts)))
    return Trajectory("x", tuple(messages), (TOOL, TOOL) if draw(st.booleans()) else ())


def byte_renderer(name: str) -> Renderer:
    """Every byte a token: equal ids are equal texts, wherever blocks begin."""
    return Renderer(FORMATS[name], phrase_tokenizer([], FORMATS[name]), "bytes")


def ids_of(renderer: Renderer, trajectory: Trajectory) -> list[int]:
    rendered = renderer.render(trajectory)
    ids = list(rendered.initial_ids)
    for turn in rendered.turns:
        ids += [*turn.action_ids, *turn.answer_ids]
    return ids


def published(template: Path, trajectory: Trajectory) -> str:
    """What the model's own template makes of it, as transformers renders templates."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(
        value, ensure_ascii=ensure_ascii
    )
    messages: list[dict[str, Any]] = []
    for message in trajectory.messages:
        wire: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning_content is not None:
            wire["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            wire["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in message.tool_calls
            ]
        messages.append(wire)
    return environment.from_string(template.read_text()).render(
        messages=messages, tools=list(trajectory.tools)
    )


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(trajectory=conversations())
def test_equals_the_published_template(shared_data: Path, name: str, trajectory: Trajectory) -> None:
    expected = published(shared_data / "templates" / TEMPLATES[name], trajectory)
    if trajectory.messages[-1].role == "assistant":
        # What the model produces last: GLM's stop id; Qwen's ends before the template's line feed.
        expected = expected + "<|user|>" if name == "glm-4.5" else expected.removesuffix("\n")
    renderer = byte_renderer(name)
    parsing = phrase_tokenizer([], FORMATS[name])
    assert ids_of(renderer, trajectory) == parsing.encode(expected, add_special_tokens=False).ids


def dump(renderer: Renderer, trajectory: Trajectory) -> list[tuple[str, str]]:
    """Action (with opening) and answer of every turn as text."""
    turns = renderer.render(trajectory).turns
    return [(renderer.decode(turn.action_ids), renderer.decode(turn.answer_ids)) for turn in turns]


CALL = ToolCall("bash", {"command": "ls", "n": 2})
SEVERAL_USERS = Trajectory(
    "x",
    (
        Message("user", "hi"),
        Message("assistant", "hello", reasoning_content="greet"),
        Message("user", "list"),
        Message("assistant", "", reasoning_content="look", tool_calls=(CALL, CALL)),
        Message("tool", "a"),
        Message("tool", "b"),
        Message("user", "thanks"),
        Message("assistant", "<think>\nend\n</think>\nbye"),
    ),
)


def test_glm_stop_ids_and_kept_reasoning() -> None:
    call = (
        "\n<tool_call>bash\n<arg_key>command</arg_key>\n<arg_value>ls</arg_value>\n"
        "<arg_key>n</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    )
    assert dump(byte_renderer("glm-4.5"), SEVERAL_USERS) == [
        ("<|assistant|>\n<think>greet</think>\nhello<|user|>", "\nlist"),
        (
            f"<|assistant|>\n<think>look</think>{call}{call}<|observation|>",
            "\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response><|user|>\nthanks",
        ),
        ("<|assistant|>\n<think>end</think>\nbye<|user|>", ""),
    ]


def test_qwen_stop_ids_and_kept_reasoning() -> None:
    call = '<tool_call>\n{"name": "bash", "arguments": {"command": "ls", "n": 2}}\n</tool_call>'
    assert dump(byte_renderer("qwen3"), SEVERAL_USERS) == [
        (
            "<|im_start|>assistant\n<think>\ngreet\n</think>\n\nhello<|im_end|>",
            "\n<|im_start|>user\nlist<|im_end|>\n",
        ),
        (
            f"<|im_start|>assistant\n<think>\nlook\n</think>\n\n{call}\n{call}<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>"
            "<|im_end|>\n<|im_start|>user\nthanks<|im_end|>\n",
        ),
        ("<|im_start|>assistant\n<think>\nend\n</think>\n\nbye<|im_end|>", ""),
    ]


def test_an_action_cut_by_length_has_no_stop_id() -> None:
    messages = (Message("user", "u"), Message("assistant", "cu", cut=True), Message("tool", "r"))
    assert dump(byte_renderer("glm-4.5"), Trajectory("x", messages)) == [
        ("<|assistant|>\n<think></think>\ncu", "<|observation|>\n<tool_response>\nr\n</tool_response>")
    ]
    assert dump(byte_renderer("qwen3"), Trajectory("x", messages))[0] == (
        "<|im_start|>assistant\ncu",
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nr\n</tool_response><|im_end|>\n",
    )


def test_consecutive_actions_each_produce_their_stop_id() -> None:
    messages = (Message("user", "u"), Message("assistant", "a"), Message("assistant", "b"))
    glm = dump(byte_renderer("glm-4.5"), Trajectory("x", messages))
    assert glm[0] == ("<|assistant|>\n<think></think>\na<|user|>", "")
    assert dump(byte_renderer("qwen3"), Trajectory("x", messages))[0] == (
        "<|im_start|>assistant\na<|im_end|>",
        "\n",
    )


@pytest.mark.parametrize("name", FORMATS)
def test_content_cannot_forge_control_tokens(name: str) -> None:
    renderer = byte_renderer(name)
    spelled = "".join(FORMATS[name].controls)
    rendered = renderer.render(
        Trajectory("x", (Message("user", spelled), Message("assistant", spelled), Message("tool", spelled)))
    )
    harmless = renderer.render(
        Trajectory("x", (Message("user", "u"), Message("assistant", "u"), Message("tool", "u")))
    )
    specials = {renderer._control_id(token) for token in FORMATS[name].controls}

    def count(ids: tuple[int, ...]) -> int:
        return sum(token in specials for token in ids)

    assert count(rendered.initial_ids) == count(harmless.initial_ids) > 0
    for forged, plain in zip(rendered.turns, harmless.turns, strict=True):
        assert count(forged.action_ids) == count(plain.action_ids)
        assert count(forged.answer_ids) == count(plain.answer_ids)


def test_wrong_tokenizers_and_unknown_renderers_are_refused(tmp_path: Path) -> None:
    save_tokenizer(phrase_tokenizer([], FORMATS["qwen3"]), tmp_path / "qwen")
    with pytest.raises(ValueError, match=r"has no token '\[gMASK\]', which the glm-4.5 format needs"):
        load_renderer("glm-4.5", tmp_path / "qwen")
    with pytest.raises(ValueError, match=r"'llama' is not registered .*glm-4.5, qwen3.*rewrites earlier"):
        load_renderer("llama", tmp_path / "qwen")
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        load_renderer("qwen3", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        load_renderer("qwen3", tmp_path)


def test_a_saved_tokenizer_loads_in_transformers(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(phrase_tokenizer(["Hello 12 world"], FORMATS["glm-4.5"]), tmp_path)
    theirs, ours = (
        AutoTokenizer.from_pretrained(tmp_path),
        Tokenizer.from_file(str(tmp_path / "tokenizer.json")),
    )
    sample = "<|user|>Hello 12 world, ü<|assistant|>"
    assert theirs(sample)["input_ids"] == ours.encode(sample).ids
    assert theirs.decode(ours.encode(sample).ids) == sample
    assert len(ours.encode("Hello 12 world").ids) == 4
