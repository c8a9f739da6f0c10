"""Live contexts are training windows; episodes in a real sandbox, with an engine that follows a script."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.agent.clock import BudgetClock, TokenClock, WallClock
from megatron_klong.agent.context import LiveContext
from megatron_klong.agent.episode import (
    Agent,
    AgentTask,
    Answer,
    Episode,
    OutOfTimeError,
    StopReason,
    prompt_hash,
)
from megatron_klong.agent.tools import TOOLS, describe_tools
from megatron_klong.config import SandboxConfig
from megatron_klong.data.blocks import TokenBlocks
from megatron_klong.data.windows import WindowAssembler
from megatron_klong.factory.replication import (
    SYSTEM_PROMPT,
    ReplicationTask,
    expert_trajectory,
)
from megatron_klong.inference.wire import Generation, Sampling, VersionSpan
from megatron_klong.judge.rubric import Check, NodeGrade, RubricNode
from megatron_klong.rl.experience import ContextMismatchError, ExperienceMaker
from megatron_klong.rl.live import InsertedTokens
from megatron_klong.rollout.journal import Journal, RolloutKey
from megatron_klong.rollout.runner import RolloutRunner
from megatron_klong.rollout.task import Task, read_task, task_folders
from megatron_klong.sandbox.base import SandboxSpec
from megatron_klong.sandbox.bubblewrap import Bubblewrap
from megatron_klong.trajectory.render import Renderer, Text, load_renderer
from megatron_klong.trajectory.schema import Message, ToolCall
from megatron_klong.window import ContextWindow, TrajectoryFacts, TurnFacts

LIMITS = SandboxConfig(memory_mib=128, processes=16, disk_mib=1)
INSERTED = InsertedTokens(opening_ids=(901,), marker_ids=(902, 903), note_ids=(904,))


def rule(**changes: int | str) -> ContextWindow:
    sizes: dict[str, int | str] = {
        "max_tokens": 60, "overlap_tokens": 12, "reserve_generation": 8, "reserve_observation": 10,
        "max_prefix_tokens": 20, "marker_tokens": 2, "opener_tokens": 1, "note_tokens": 1,
    }  # fmt: skip
    return ContextWindow(**{**sizes, **changes})  # type: ignore[arg-type]


turn_sizes = st.tuples(st.integers(1, 8), st.integers(0, 25), st.booleans())


@given(
    st.integers(1, 20), st.lists(turn_sizes, min_size=1, max_size=40), st.sampled_from(["task", "reading"])
)
@settings(max_examples=300, deadline=None)
def test_live_contexts_are_the_beginnings_of_training_windows(
    initial: int, sizes: list[tuple[int, int, bool]], prefix: str
) -> None:
    """Every token has an id of its own, so any difference in order or choice shows."""
    ids = iter(range(1000, 10**6))
    take: Callable[[int], list[int]] = lambda count: [next(ids) for _ in range(count)]  # noqa: E731
    window_rule, initial_ids = rule(prefix=prefix), take(initial)
    live = LiveContext(window_rule, initial_ids=initial_ids, opening_ids=INSERTED.opening_ids,
                       marker_ids=INSERTED.marker_ids, note_ids=INSERTED.note_ids)  # fmt: skip
    blocks, prompts = [initial_ids], []
    for action_size, answer_size, reading in sizes:
        prompts.append(live.prompt())
        assert len(prompts[-1]) + 8 <= 60  # room for the action
        action, answer = take(action_size), take(answer_size)
        kept = live.advance(action, answer, reading=reading)
        # The offline side gets the block whole, and cuts it itself.
        assert len(kept) == min(answer_size, 10)
        blocks += [[*INSERTED.opening_ids, *action], answer]
    bounds = np.cumsum([0, *map(len, blocks)])
    tokens = np.array([token for block in blocks for token in block])
    facts = TrajectoryFacts(initial, tuple(TurnFacts(a, o, reading=r) for a, o, r in sizes))
    assembler = WindowAssembler(window_rule, INSERTED)
    trained = 0
    for window in window_rule.split(facts).windows:
        stored = TokenBlocks(tokens, np.ones(len(tokens), dtype=np.uint8), bounds)
        sample = assembler.sample(window, stored, 0)
        for turn in window.trained_turns:
            prompt, action = prompts[turn], blocks[2 * turn + 1][1:]
            expected = [*prompt, *action]
            assert sample.tokens_T[: len(expected)].tolist() == expected
            trained += 1
    assert trained == len(sizes)


# Episodes


@pytest.fixture(scope="module")
def renderer(domain: Path) -> Renderer:
    return load_renderer("glm-4.5", domain / "tokenizer")


class ScriptedEngine:
    """Says what it is told to, and remembers what it was shown."""

    def __init__(self, actions: Sequence[Sequence[int]], seconds: float = 1.0) -> None:
        self._actions = list(actions)
        self._seconds = seconds
        self.prompts: list[tuple[int, ...]] = []
        self.limits: list[float | None] = []

    async def generate(
        self, prompt_ids: Sequence[int], sampling: Sampling, limit_seconds: float | None, session: int
    ) -> Answer:
        self.prompts.append(tuple(prompt_ids))
        self.limits.append(limit_seconds)
        if limit_seconds is not None and limit_seconds < self._seconds:
            raise OutOfTimeError
        ids = tuple(self._actions.pop(0))
        cut = len(ids) >= sampling.max_tokens
        generation = Generation(
            token_ids=ids[: sampling.max_tokens], log_probs=(-0.5,) * min(len(ids), sampling.max_tokens),
            finish_reason="length" if cut else "stop", versions=(VersionSpan("v", 0, len(ids)),),
            cached_tokens=0, prompt_ids=tuple(prompt_ids),
        )  # fmt: skip
        return Answer(generation, self._seconds)


TASK = ReplicationTask("t", key=7, measurements=("42", "90", "05"))
AGENT_TASK = AgentTask(
    "t", (Message("system", SYSTEM_PROMPT), Message("user", TASK.prompt)), {"method": TASK.method}
)


def agent(renderer: Renderer, **changes: int | str) -> Agent:
    marker, note = renderer.marker("[Earlier turns are omitted.]"), renderer.note("\n[...]\n")
    sizes = {"max_tokens": 640, "overlap_tokens": 40, "reserve_generation": 140, "reserve_observation": 90,
             "max_prefix_tokens": 120, "prefix": "reading"}  # fmt: skip
    window = ContextWindow(**{**sizes, **changes}, marker_tokens=len(marker), note_tokens=len(note),  # type: ignore[arg-type]
                           opener_tokens=len(renderer.opening_ids))  # fmt: skip
    sampling = Sampling(max_tokens=window.reserve_generation, stop_token_ids=renderer.stop_ids)
    return Agent(renderer, window, marker, note, sampling, ("read_paper",), 10.0)


def play(player: Agent, engine: ScriptedEngine, clock: BudgetClock, public: Path | None = None) -> Episode:
    async def in_sandbox() -> Episode:
        shown = {"/task": public} if public else {}
        sandbox = await Bubblewrap().open(SandboxSpec(LIMITS, shown, ("/task/bin",)))
        try:
            return await player.play(AGENT_TASK, engine, sandbox, clock, seed=1)
        finally:
            await sandbox.close()

    return asyncio.run(in_sandbox())


def act(renderer: Renderer, text: str, stop: str = "<|observation|>") -> list[int]:
    """What a model would sample to say this."""
    from megatron_klong.trajectory.render import Control, Text

    return list(renderer.encode([Text(text), Control(stop)]))


def call(name: str, **arguments: str) -> str:
    inside = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in arguments.items())
    return f"\n<think></think>\n<tool_call>{name}\n{inside}</tool_call>"


def long_clock() -> TokenClock:
    return TokenClock(10_000, 0)


def test_the_expert_and_the_agent_live_in_the_same_world(renderer: Renderer, domain: Path) -> None:
    """The expert acts in process; its calls in the real sandbox give the same conversation, and tokens."""
    folder = task_folders(domain / "tasks")[0]
    task, player = read_task(folder), agent(renderer, max_tokens=256, reserve_generation=16,
                                            overlap_tokens=48, reserve_observation=16,
                                            max_prefix_tokens=102)  # fmt: skip
    from megatron_klong.factory.generate import generate_tasks

    original = next(iter(generate_tasks(12, 7)))
    assert original.id == task.agent.id
    expert = expert_trajectory(original)
    rendered = renderer.render(expert)
    opening = len(renderer.opening_ids)
    engine = ScriptedEngine([turn.action_ids[opening:] for turn in rendered.turns])

    async def replay() -> Episode:
        sandbox = await Bubblewrap().open(SandboxSpec(LIMITS, task.read_only, task.path))
        try:
            return await player.play(task.agent, engine, sandbox, long_clock(), seed=1)
        finally:
            await sandbox.close()

    episode = asyncio.run(replay())
    assert episode.stop is StopReason.SUBMITTED
    assert episode.initial_ids == rendered.initial_ids
    assert [turn.action_ids for turn in episode.turns] == [t.action_ids[opening:] for t in rendered.turns]
    # After the last action nothing is generated, so its answer is in no context.
    assert [turn.answer_ids for turn in episode.turns[:-1]] == [t.answer_ids for t in rendered.turns[:-1]]
    said = [message.content for message in episode.messages if message.role == "tool"]
    assert said == [message.content for message in expert.messages if message.role == "tool"]


def test_calls_are_carried_out_and_malformed_ones_observed(renderer: Renderer) -> None:
    engine = ScriptedEngine(
        [
            act(renderer, call("bash", command="echo $((6 * 7)); exit 3")),
            act(renderer, "\n<think></think>\n<tool_call>bash\n<arg_key>command"),
            act(renderer, "\n<think></think>\nno call", stop="<|user|>"),
            act(renderer, call("dance")),
            act(renderer, call("bash")),
            act(renderer, call("bash", command="true", mood="good")),
            act(renderer, call("read_paper", section="results")),
            act(renderer, call("write_file", path="a", content="x")
                + call("bash", command="cat a").removeprefix("\n<think></think>")),
            act(renderer, call("bash", command="echo end"), stop="<|endoftext|>"),
            list(renderer.encode([Text("z" * 300)])),
            act(renderer, call("submit")),
        ]
    )  # fmt: skip
    player = agent(renderer, max_tokens=4000, reserve_generation=150, max_prefix_tokens=300)
    episode = play(player, engine, long_clock())
    answers = [(message.role, message.content) for message in episode.messages if message.role != "assistant"]
    assert answers[2:] == [
        ("tool", "42\n[exit code 3]"),
        ("user", "Your message could not be read: call 1 has no </tool_call>."),
        ("user", "Go on by calling a tool; call submit when the work is done."),
        ("tool", "There is no tool 'dance'; there are: read_paper, bash, write_file, submit."),
        ("tool", "bash: the argument 'command' is missing."),
        ("tool", "bash has no argument 'mood'."),
        ("tool", "No such section; there are: method."),
        ("tool", "Written."),
        ("tool", "x"),
        ("tool", "end"),
        ("user", "Go on by calling a tool; call submit when the work is done."),
        ("tool", "Submitted."),
    ]
    assert episode.stop is StopReason.SUBMITTED
    cut = episode.messages[-4]
    assert cut.cut and len(episode.turns[-2].action_ids) == 150
    text = [renderer.decode(prompt) for prompt in engine.prompts]
    # The token that ended an action opens its answer, and stands there once.
    assert "</tool_call><|observation|>\n<tool_response>\n42\n[exit code 3]" in text[1]
    assert "command<|observation|><|user|>\nYour message could not be read" in text[2]
    assert "no call<|user|>\nGo on by" in text[3]
    assert "</tool_call><|endoftext|><|observation|>\n<tool_response>\nend" in text[9]
    assert "zzz<|user|>\nGo on by" in text[10]
    assert all(prompt.endswith("<|assistant|>") for prompt in text)


def test_an_agent_that_ends_its_sandbox_has_ended_its_episode(tmp_path: Path, renderer: Renderer) -> None:
    """It is graded, on nothing: to make its judge go away must not pay."""
    engine = ScriptedEngine([act(renderer, call("bash", command=command)) for command in
                             ("echo a\0b", "echo 1 > 01", "kill -9 -1")])  # fmt: skip
    player = agent(renderer)
    runner = RolloutRunner(player, engine, Bubblewrap(), LIMITS)
    leaf = RubricNode(id="leaf", requirements="r", weight=1)
    task = Task(AGENT_TASK, {}, (), leaf, {"leaf": Check(command="test -e 01")})

    async def roll_out() -> tuple[Episode, NodeGrade]:
        episode = await runner.play(task, long_clock(), 1, tmp_path / "s.tar")
        return episode, await runner.grade(task, tmp_path / "s.tar")

    episode, grade = asyncio.run(roll_out())
    assert episode.stop is StopReason.SANDBOX_LOST
    assert len(episode.turns) == 3
    answers = [message.content or "" for message in episode.messages if message.role == "tool"]
    assert "could not be started" in answers[0] and answers[1] == "" and "sandbox is lost" in answers[2]
    assert grade.score == 0


def test_the_token_clock_stops_an_episode_at_the_same_place_on_any_machine(renderer: Renderer) -> None:
    actions = [act(renderer, call("bash", command="echo x >> log"))] * 50
    sizes = [len(action) for action in actions]
    episode = play(agent(renderer), ScriptedEngine(actions), TokenClock(900, 10))
    assert episode.stop is StopReason.TIMEOUT
    spent = turns = 0
    while spent < 900:
        turns += 1
        spent += sizes[0]
        if spent < 900:  # else the action is kept, and its call is not carried out
            spent += 10
    assert len(episode.turns) == turns
    assert episode.budget.generation + episode.budget.tools == spent
    assert not episode.turns[-1].answer_ids


def test_the_wall_clock_charges_generation_and_tools(renderer: Renderer) -> None:
    actions = [act(renderer, call("bash", command="sleep 0.2"))] * 50
    engine = ScriptedEngine(actions, seconds=1.0)
    episode = play(agent(renderer), engine, WallClock(5.0))
    assert episode.stop is StopReason.TIMEOUT
    assert episode.budget.unit == "seconds"
    assert episode.budget.generation + episode.budget.tools == pytest.approx(5.0, abs=0.3)
    assert 3 <= len(episode.turns) <= 4
    assert episode.budget.tools >= 0.2 * len(episode.turns)
    first, second = engine.limits[:2]
    assert first == 5.0 and second is not None and 3.0 < second < 3.8


def test_a_tool_may_not_outlast_the_clock(renderer: Renderer) -> None:
    engine = ScriptedEngine([act(renderer, call("bash", command="sleep 60"))], seconds=0.5)
    episode = play(agent(renderer), engine, WallClock(1.5))
    assert episode.stop is StopReason.TIMEOUT
    assert "its time limit" in (episode.messages[-1].content or "")
    assert episode.budget.tools < 5


# From episode to training samples


def journalled(
    tmp_path: Path, renderer: Renderer, player: Agent, episode: Episode
) -> tuple[Journal, RolloutKey]:
    journal = Journal(tmp_path, renderer.opening_ids, player.reading_tools)
    key = RolloutKey("train", 1, 0, 0)
    journal.submission(key).touch()
    journal.record_played(key, 0, "t", episode)
    return journal, key


def maker(player: Agent) -> ExperienceMaker:
    inserted = InsertedTokens(player.renderer.opening_ids, player.marker_ids, player.note_ids)
    return ExperienceMaker(player.rule, inserted)


def test_segments_hold_every_sampled_token_once_with_its_log_prob(tmp_path: Path, renderer: Renderer) -> None:
    player = agent(renderer)
    actions = [act(renderer, call("bash", command=f"echo {number:03d}")) for number in range(40)]
    engine = ScriptedEngine([act(renderer, call("read_paper", section="method")), *actions])
    episode = play(player, engine, TokenClock(sum(map(len, actions)) * 0.8, 0))
    numbered = [
        type(turn)(
            **{**vars(turn), "log_probs": tuple(-(100.0 * n + k) for k in range(len(turn.action_ids)))}
        )
        for n, turn in enumerate(episode.turns)
    ]
    episode = Episode(**{**vars(episode), "turns": tuple(numbered)})
    journal, key = journalled(tmp_path, renderer, player, episode)
    segments = maker(player).segments(journal.tokens(key), 5)
    assert len(segments) > 2
    assert {segment.sample.trajectory for segment in segments} == {5}
    assert [segment.sample.window for segment in segments] == list(range(len(segments)))
    sampled = [token for turn in episode.turns for token in turn.action_ids]
    given = [p for turn in episode.turns for p in turn.log_probs]
    assert [t for s in segments for t in s.sample.tokens_T[s.sample.loss_mask_T].tolist()] == sampled
    assert [p for s in segments for p in s.log_probs.tolist()] == given
    # The paper stays in every window.
    assert all("followed by 7." in renderer.decode(s.sample.tokens_T.tolist()) for s in segments)


def test_an_engine_that_saw_something_else_is_found_out(tmp_path: Path, renderer: Renderer) -> None:
    player = agent(renderer)
    engine = ScriptedEngine([act(renderer, call("bash", command="echo 1")), act(renderer, call("submit"))])
    episode = play(player, engine, long_clock())
    first, second = episode.turns
    other = (*engine.prompts[1][:-2], 5, engine.prompts[1][-1])
    wrong = type(second)(**{**vars(second), "prompt_sha256": prompt_hash(other)})
    journal, key = journalled(
        tmp_path, renderer, player, Episode(**{**vars(episode), "turns": (first, wrong)})
    )
    with pytest.raises(ContextMismatchError, match="turn 1: the prompt of"):
        maker(player).segments(journal.tokens(key), 0)


# Parsing


names = st.text("abcdefgh_", min_size=1, max_size=8)
values = st.text(st.characters(blacklist_categories=["Cs"]), max_size=30).filter(
    lambda text: (
        not any(
            tag in text for tag in ("<arg_", "</arg_", "<tool_call>", "</tool_call>", "<think>", "</think>")
        )
    )
)
calls = st.builds(ToolCall, names, st.dictionaries(names, values, max_size=3))
messages = st.builds(
    Message, st.just("assistant"), values.map(str.strip).map(lambda text: text or None),
    values.map(str.strip).map(lambda text: text or None), st.lists(calls, max_size=3).map(tuple),
)  # fmt: skip


@pytest.mark.parametrize("family", ["glm-4.5", "qwen3"])
@given(message=messages)
@settings(max_examples=300, deadline=None)
def test_what_is_rendered_is_read_back(family: str, message: Message) -> None:
    from megatron_klong.trajectory.formats import chat_format
    from megatron_klong.trajectory.schema import Message as Plain

    chosen = chat_format(family)
    if family == "qwen3" and message.content and message.content != message.content.strip("\n"):
        return
    text = "".join(piece.text for piece in chosen.action(message, last=True) if isinstance(piece, Text))
    parsed = chosen.parse(text, ())
    assert parsed.problem is None
    assert isinstance(parsed.message, Plain)
    assert parsed.message.tool_calls == message.tool_calls
    assert (parsed.message.content or "") == (message.content or "")
    assert (parsed.message.reasoning_content or "") == (message.reasoning_content or "")


@pytest.mark.parametrize("family", ["glm-4.5", "qwen3"])
@given(pieces=st.lists(st.sampled_from(
    ["<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "<think>",
     "</think>", "\n", "bash", '{"name": "a"', "}", "x"]), max_size=20))  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_any_text_is_read_or_refused(family: str, pieces: list[str]) -> None:
    from megatron_klong.trajectory.formats import chat_format

    parsed = chat_format(family).parse("".join(pieces), describe_tools())
    if parsed.problem is not None:
        assert parsed.message.tool_calls == () and parsed.message.content == "".join(pieces)


@pytest.mark.parametrize(
    "arguments", ['{"s": "\\ud800"}', '{"s": NaN}', '{"s": ' + "[" * 5000 + "]" * 5000 + "}"]
)  # fmt: skip
def test_arguments_that_no_json_can_hold_are_a_problem(arguments: str) -> None:
    from megatron_klong.trajectory.formats import chat_format

    said = f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    assert "call 1: " in str(chat_format("qwen3").parse(said, ()).problem)


def test_arguments_are_typed_by_the_description() -> None:
    from megatron_klong.trajectory.formats import chat_format

    schema = {"type": "object", "properties": {"n": {"type": "integer"}, "s": {"type": "string"}}}
    tools = ({"type": "function", "function": {"name": "f", "parameters": schema}},)
    parsed = chat_format("glm-4.5").parse(call("f", n="3", s="3"), tools)
    assert parsed.message.tool_calls[0].arguments == {"n": 3, "s": "3"}
    assert set(TOOLS) == {"read_paper", "bash", "write_file", "submit"}
