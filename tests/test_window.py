"""The window rule against the design, by an independent simulation on token lists."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.window import (
    ContextWindow,
    NotTrained,
    TrajectoryFacts,
    TurnFacts,
    truncate,
    turn_table,
    window_table,
)

Token = tuple[object, ...]


@st.composite
def rules(draw: st.DrawFn) -> ContextWindow:
    """Any rule that is not refused, tight ones among them."""
    generation, observation = draw(st.integers(2, 30)), draw(st.integers(2, 30))
    opener, marker, overlap = draw(st.integers(0, 3)), draw(st.integers(0, 5)), draw(st.integers(0, 80))
    prefix = draw(st.integers(0, 60))
    room = opener + generation
    least = prefix + marker + max(overlap, room + observation) + room
    return ContextWindow(
        max_tokens=least + draw(st.sampled_from([0, 0, 1, 7, 60])),
        overlap_tokens=overlap,
        reserve_generation=generation,
        reserve_observation=observation,
        max_prefix_tokens=prefix,
        marker_tokens=marker,
        opener_tokens=opener,
        note_tokens=1,
        prefix=draw(st.sampled_from(["task", "reading", "marked"])),
    )


@st.composite
def cases(draw: st.DrawFn) -> tuple[ContextWindow, TrajectoryFacts]:
    rule = draw(rules())
    turn = st.builds(
        TurnFacts,
        action_tokens=st.integers(1, rule.reserve_generation + 4),
        answer_tokens=st.integers(0, rule.reserve_observation + 20),
        reading=st.booleans(),
        context_only=st.sampled_from([False, False, False, True]),
    )
    facts = TrajectoryFacts(
        initial_tokens=draw(st.integers(0, rule.max_prefix_tokens)),
        turns=tuple(draw(st.lists(turn, min_size=1, max_size=60))),
        marked_turns=draw(st.integers(0, 5)),
    )
    return rule, facts


def block(name: Token, length: int, cap: int) -> list[Token]:
    """A block's tokens as they stand in a context: each has a name of its own."""
    tokens = [(*name, index) for index in range(length)]
    if length <= cap:
        return tokens
    head, tail = cap - 1 - (cap - 1) // 2, (cap - 1) // 2
    return [*tokens[:head], (*name, "note"), *tokens[length - tail :]]


class LiveRun:
    """A rollout as the design tells it, on lists of tokens; knows nothing of the product's cursor."""

    def __init__(self, rule: ContextWindow, facts: TrajectoryFacts) -> None:
        self.rule, self.facts = rule, facts
        self.initial: list[Token] = [("initial", index) for index in range(facts.initial_tokens)]
        self.turns = [
            [("open", number, index) for index in range(rule.opener_tokens)]
            + block(("action", number), turn.action_tokens, rule.reserve_generation)
            + block(("answer", number), turn.answer_tokens, rule.reserve_observation)
            for number, turn in enumerate(facts.turns)
        ]

    def prefix(self, seen: int) -> tuple[int, list[Token]]:
        """The pinned prefix, judged by the first ``seen`` turns."""
        pinned, tokens = 0, list(self.initial)
        for number in range(seen):
            run = {
                "task": False,
                "reading": self.facts.turns[number].reading,
                "marked": number < self.facts.marked_turns,
            }[self.rule.prefix]
            if not run or len(tokens) + len(self.turns[number]) > self.rule.max_prefix_tokens:
                break
            tokens += self.turns[number]
            pinned += 1
        return pinned, tokens

    def contexts(self) -> list[tuple[int, list[Token]]]:
        """Window number and the tokens seen before each action."""
        rule = self.rule
        seen: list[tuple[int, list[Token]]] = []
        window, base, shown = 0, list(self.initial), []  # type: ignore[var-annotated]
        for number in range(len(self.turns)):
            used = base + [token for turn in shown for token in self.turns[turn]]
            if len(used) + rule.opener_tokens + rule.reserve_generation > rule.max_tokens:
                pinned, tokens = self.prefix(number)
                base = tokens + [("marker", index) for index in range(rule.marker_tokens)]
                shown = [number - 1]
                limit = max(rule.overlap_tokens, len(self.turns[number - 1]))
                while shown[0] > pinned:
                    size = sum(len(self.turns[turn]) for turn in [shown[0] - 1, *shown])
                    if size > limit:
                        break
                    shown.insert(0, shown[0] - 1)
                window += 1
                used = base + [token for turn in shown for token in self.turns[turn]]
            seen.append((window, used))
            shown.append(number)
        return seen


@settings(max_examples=400, deadline=None)
@given(cases())
def test_offline_windows_are_the_contexts_of_a_live_run(case: tuple[ContextWindow, TrajectoryFacts]) -> None:
    rule, facts = case
    live = LiveRun(rule, facts)
    cursor = rule.open(facts.initial_tokens, facts.marked_turns)
    offline = {}
    for split in rule.split(facts).windows:
        for number in range(split.context.first_new_turn, split.last_turn + 1):
            offline[number] = split.context
    for number, ((window, tokens), turn) in enumerate(zip(live.contexts(), facts.turns, strict=True)):
        context = cursor.context
        split_context = offline[number]
        assert (split_context.window, split_context.first_turn, split_context.marker) == (
            context.window, context.first_turn, context.marker,
        )  # fmt: skip
        assert split_context.prefix_turns == context.prefix_turns
        if number == split_context.next_turn:
            assert split_context == context
        assert (context.window, context.tokens) == (window, len(tokens))
        rebuilt = (
            live.initial
            + [token for number in range(context.prefix_turns) for token in live.turns[number]]
            + [("marker", index) for index in range(rule.marker_tokens * context.marker)]
            + [
                token
                for number in range(context.first_turn, context.next_turn)
                for token in live.turns[number]
            ]
        )
        assert rebuilt == tokens
        cursor.advance(turn)


@settings(max_examples=400, deadline=None)
@given(cases())
def test_split_keeps_its_promises(case: tuple[ContextWindow, TrajectoryFacts]) -> None:
    rule, facts = case
    split = rule.split(facts)
    trained = [turn for window in split.windows for turn in window.trained_turns]
    reasons = dict(split.not_trained)
    assert sorted([*trained, *reasons]) == list(range(len(facts.turns)))  # once, or named
    for number, reason in reasons.items():
        turn = facts.turns[number]
        assert turn.context_only == (reason is NotTrained.CONTEXT_ONLY)
        assert turn.context_only or turn.action_tokens > rule.reserve_generation
    live = LiveRun(rule, facts)
    for window in split.windows:
        assert window.tokens <= rule.max_tokens
        assert set(window.trained_turns) <= set(range(window.context.first_new_turn, window.last_turn + 1))
    for before, after in zip(split.windows, split.windows[1:], strict=False):
        assert after.context.first_new_turn == before.last_turn + 1
        assert after.context.first_turn <= before.last_turn  # the last turn is present
        overlap = range(after.context.first_turn, after.context.first_new_turn)
        taken = sum(len(live.turns[turn]) for turn in overlap)
        assert taken <= max(rule.overlap_tokens, len(live.turns[before.last_turn]))


@settings(max_examples=300, deadline=None)
@given(cases(), st.data())
def test_a_table_of_many_has_the_windows_of_each(
    case: tuple[ContextWindow, TrajectoryFacts], data: st.DataObject
) -> None:
    """One trajectory's windows do not depend on those beside it; some have no turn, some too long a start."""
    rule, facts = case
    turn = st.builds(TurnFacts, st.integers(1, 34), st.integers(0, 50), st.booleans(), st.booleans())
    other = st.builds(
        TrajectoryFacts, st.integers(0, rule.max_prefix_tokens + 2),
        st.lists(turn, max_size=20).map(tuple), st.integers(0, 5),
    )  # fmt: skip
    many = data.draw(st.permutations([facts, *data.draw(st.lists(other, max_size=4))]))
    table = window_table(rule, turn_table(many))
    for number, each in enumerate(many):
        windows = [table.window(place) for place in table.of(number)]
        assert windows == list(rule.split(each).windows)
        assert [bool(window.trained_turns) for window in windows] == table.trains[table.of(number)].tolist()
    assert len(table) == sum(len(rule.split(each).windows) for each in many)


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 59))
def test_only_the_past_decides(case: tuple[ContextWindow, TrajectoryFacts], cut: int) -> None:
    rule, facts = case
    count = min(cut + 1, len(facts.turns))
    shorter = replace(facts, turns=facts.turns[:count])

    def contexts(of: TrajectoryFacts) -> list[object]:
        cursor = rule.open(of.initial_tokens, of.marked_turns)
        return [cursor.context, *(cursor.advance(turn) for turn in of.turns)]

    assert contexts(shorter) == contexts(facts)[: count + 1]


def test_an_answer_that_does_not_fit_opens_the_next_window() -> None:
    rule = ContextWindow(
        max_tokens=40, overlap_tokens=0, reserve_generation=8, reserve_observation=16, max_prefix_tokens=8
    )
    facts = TrajectoryFacts(4, (TurnFacts(8, 16), TurnFacts(4, 16), TurnFacts(3, 0)))
    first, second = rule.split(facts).windows
    # After turn 0: 28 used, 8 fit. After turn 1: 48 used; so turn 1 moves on whole, turn 0 is gone.
    assert (first.tokens, first.trained_turns) == (4 + 24 + 4, (0, 1))
    assert (second.tokens, second.trained_turns) == (4 + 20 + 3, (2,))
    assert (second.context.first_turn, second.context.marker) == (1, True)


def test_reading_turns_stay_in_every_window() -> None:
    rule = ContextWindow(
        max_tokens=60, overlap_tokens=0, reserve_generation=8, reserve_observation=8,
        max_prefix_tokens=20, prefix="reading",
    )  # fmt: skip
    reading, working = TurnFacts(4, 4, reading=True), TurnFacts(4, 4)
    facts = TrajectoryFacts(2, (reading, reading, working, reading, *[working] * 9))
    later = rule.split(facts).windows[1:]
    assert later
    assert {window.context.prefix_turns for window in later} == {2}  # turn 3 reads, after work began


def test_over_cap_prefix_is_named_or_raises() -> None:
    rule = ContextWindow(
        max_tokens=60, overlap_tokens=0, reserve_generation=8, reserve_observation=8, max_prefix_tokens=10
    )
    facts = TrajectoryFacts(11, (TurnFacts(2, 2), TurnFacts(2, 2, context_only=True)))
    split = rule.split(facts)
    assert split.windows == ()
    assert dict(split.not_trained) == {0: NotTrained.PREFIX_OVER_CAP, 1: NotTrained.CONTEXT_ONLY}
    with pytest.raises(ValueError, match="11 tokens, over the prefix cap of 10"):
        replace(rule, untrainable="error").split(facts)


def test_over_long_action_is_named_or_raises() -> None:
    rule = ContextWindow(
        max_tokens=60, overlap_tokens=0, reserve_generation=8, reserve_observation=8, max_prefix_tokens=10
    )
    facts = TrajectoryFacts(2, (TurnFacts(9, 2), TurnFacts(8, 2)))
    assert dict(rule.split(facts).not_trained) == {0: NotTrained.ACTION_OVER_LIMIT}
    with pytest.raises(ValueError, match="turn 0 has 9 tokens, over reserve_generation=8"):
        replace(rule, untrainable="error").split(facts)


@given(rules())
def test_one_token_less_is_refused(rule: ContextWindow) -> None:
    room = rule.opener_tokens + rule.reserve_generation
    least = (
        rule.max_prefix_tokens
        + rule.marker_tokens
        + max(rule.overlap_tokens, room + rule.reserve_observation)
        + room
    )
    replace(rule, max_tokens=least)
    with pytest.raises(ValueError, match=r"max_tokens=\d+ is too small"):
        replace(rule, max_tokens=least - 1)


def test_a_note_as_long_as_the_cap_is_refused() -> None:
    with pytest.raises(ValueError, match="must exceed the truncation note"):
        ContextWindow(
            max_tokens=100, overlap_tokens=0, reserve_generation=8, reserve_observation=8,
            max_prefix_tokens=10, note_tokens=8,
        )  # fmt: skip


@given(st.integers(0, 200), st.integers(1, 50), st.integers(0, 49))
def test_truncation_keeps_head_and_tail(length: int, cap: int, note: int) -> None:
    note = min(note, cap - 1)
    kept = truncate(length, cap, note)
    if length <= cap:
        assert (kept.head, kept.tail, kept.whole) == (length, 0, True)
    else:
        assert kept.head + note + kept.tail == cap
        assert 0 <= kept.head - kept.tail <= 1
