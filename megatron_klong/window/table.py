"""All windows of many finished trajectories at once: the rule of ``window.context`` on arrays.

The cursor there follows one live episode. Here nothing is replayed: with the sizes of all turns summed up,
where a window closes and where the next one begins is found by bisection, for all trajectories together. Both
are tested to give the same windows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from megatron_klong.window.facts import Context, NotTrained, TrajectoryFacts, Window

if TYPE_CHECKING:
    from megatron_klong.window.context import ContextWindow

REASONS = (None, *NotTrained)
"""Why a turn carries no loss, by its code in :attr:`WindowTable.reasons`; 0: it does."""


@dataclass(frozen=True)
class TurnTable:
    """The facts of all turns of many trajectories, T turns in N trajectories; see :class:`TurnFacts`.

    Attributes:
        first_turn: where each trajectory's turns begin, int64, N + 1.
        initial_tokens: of the messages before the first action, int64, N.
        marked_turns: for the prefix rule ``marked``, int64, N.
        action_tokens, answer_tokens: int64, T.
        reading, context_only: bool, T.
    """

    first_turn: np.ndarray
    initial_tokens: np.ndarray
    marked_turns: np.ndarray
    action_tokens: np.ndarray
    answer_tokens: np.ndarray
    reading: np.ndarray
    context_only: np.ndarray


@dataclass(frozen=True)
class WindowTable:
    """Windows of many trajectories, W in all, by trajectory and then in order; turns count within theirs.

    Attributes:
        trajectory, number, prefix_turns, first_turn, first_new_turn, last_turn, tokens: int64, W; see
            :class:`Context` and :class:`Window`.
        context_tokens: before the last action, without its opening, int64, W.
        trains: whether any action in it carries loss, bool, W.
        reasons: code of why a turn of the turn table carries no loss, uint8, T.
        turn_offset: where each trajectory's turns begin in the turn table, int64, N + 1.
    """

    trajectory: np.ndarray
    number: np.ndarray
    prefix_turns: np.ndarray
    first_turn: np.ndarray
    first_new_turn: np.ndarray
    last_turn: np.ndarray
    tokens: np.ndarray
    context_tokens: np.ndarray
    trains: np.ndarray
    reasons: np.ndarray
    turn_offset: np.ndarray

    def __len__(self) -> int:
        return len(self.trajectory)

    def window(self, place: int) -> Window:
        """One window as a record."""
        first_new, last = int(self.first_new_turn[place]), int(self.last_turn[place])
        offset = int(self.turn_offset[self.trajectory[place]])
        trained = np.flatnonzero(self.reasons[offset + first_new : offset + last + 1] == 0) + first_new
        number = int(self.number[place])
        context = Context(
            window=number,
            prefix_turns=int(self.prefix_turns[place]) if number else 0,
            first_turn=int(self.first_turn[place]),
            first_new_turn=first_new,
            next_turn=last,
            marker=number > 0,
            tokens=int(self.context_tokens[place]),
        )
        return Window(context, int(self.tokens[place]), tuple(trained.tolist()))

    def of(self, trajectory: int) -> range:
        """The places of a trajectory's windows."""
        first, last = np.searchsorted(self.trajectory, [trajectory, trajectory + 1])
        return range(int(first), int(last))


def turn_table(trajectories: Sequence[TrajectoryFacts]) -> TurnTable:
    """The table of trajectories that are given as records."""
    turns = [turn for facts in trajectories for turn in facts.turns]

    def numbers(values: Iterable[int]) -> np.ndarray:
        return np.fromiter(values, dtype=np.int64)

    return TurnTable(
        first_turn=np.cumsum([0, *(len(facts.turns) for facts in trajectories)], dtype=np.int64),
        initial_tokens=numbers(facts.initial_tokens for facts in trajectories),
        marked_turns=numbers(facts.marked_turns for facts in trajectories),
        action_tokens=numbers(turn.action_tokens for turn in turns),
        answer_tokens=numbers(turn.answer_tokens for turn in turns),
        reading=np.array([turn.reading for turn in turns], dtype=bool),
        context_only=np.array([turn.context_only for turn in turns], dtype=bool),
    )


def window_table(rule: ContextWindow, turns: TurnTable) -> WindowTable:
    """The windows of all trajectories. One whose initial messages exceed the prefix cap has none."""
    size, summed = _sizes(rule, turns)
    reasons = _reasons(rule, turns)
    begin, end = turns.first_turn[:-1], turns.first_turn[1:]
    prefix_turns = _prefix_turns(rule, turns, summed)
    prefix_tokens = turns.initial_tokens + summed[begin + prefix_turns] - summed[begin]

    rows: list[tuple[np.ndarray, ...]] = []
    active = np.flatnonzero((turns.initial_tokens <= rule.max_prefix_tokens) & (end > begin))
    # Positions of turns below count over the whole table. `base` + `summed` is what a context holds.
    base = turns.initial_tokens[active] - summed[begin[active]]
    first = first_new = begin[active]
    number = 0
    while len(active):
        # The first turn after which, with its answer, no other action has room; or the last one.
        closes = np.searchsorted(summed, rule.max_tokens - rule.action_room - base, side="right") - 1
        last = np.minimum(np.maximum(closes, first_new), end[active] - 1)
        context = base + summed[last]
        origin = begin[active]
        rows.append((
            active, np.full(len(active), number), prefix_turns[active], first - origin, first_new - origin,
            last - origin, context + _action(rule, turns)[last], context,
        ))  # fmt: skip
        goes_on = last + 1 < end[active]
        active, last = active[goes_on], last[goes_on]
        # Keep the last turn, and older ones while they sum up to no more than it, or O.
        limit = np.maximum(rule.overlap_tokens, size[last])
        oldest = np.searchsorted(summed, summed[last + 1] - limit, side="left")
        first = np.maximum(np.minimum(oldest, last), begin[active] + prefix_turns[active])
        first_new = last + 1
        base = prefix_tokens[active] + rule.marker_tokens - summed[first]
        number += 1
    return _gathered(rows, reasons, turns.first_turn)


def _gathered(rows: list[tuple[np.ndarray, ...]], reasons: np.ndarray, offset: np.ndarray) -> WindowTable:
    columns = [np.concatenate(column) for column in zip(*rows)] if rows else [np.empty(0, np.int64)] * 8
    order = np.argsort(columns[0], kind="stable")
    trajectory, number, prefix, first, first_new, last, tokens, context = (c[order] for c in columns)
    trained = np.concatenate([[0], np.cumsum(reasons == 0)])
    at = offset[trajectory]
    return WindowTable(
        trajectory, number, prefix, first, first_new, last, tokens, context,
        trained[at + last + 1] > trained[at + first_new], reasons, offset,
    )  # fmt: skip


def _action(rule: ContextWindow, turns: TurnTable) -> np.ndarray:
    actions: np.ndarray = np.minimum(turns.action_tokens, rule.reserve_generation)
    return actions + rule.opener_tokens


def _sizes(rule: ContextWindow, turns: TurnTable) -> tuple[np.ndarray, np.ndarray]:
    """Of each turn as it stands in a context, and summed up from the first turn of all, one more."""
    size = _action(rule, turns) + np.minimum(turns.answer_tokens, rule.reserve_observation)
    return size, np.concatenate([[0], np.cumsum(size)])


def _reasons(rule: ContextWindow, turns: TurnTable) -> np.ndarray:
    """Why each turn carries no loss, the first reason that holds."""
    counts = np.diff(turns.first_turn)
    over_cap = np.repeat(turns.initial_tokens > rule.max_prefix_tokens, counts)
    too_long = turns.action_tokens > rule.reserve_generation
    codes = np.zeros(len(turns.action_tokens), dtype=np.uint8)
    for condition, reason in (
        (too_long, NotTrained.ACTION_OVER_LIMIT),
        (over_cap, NotTrained.PREFIX_OVER_CAP),
        (turns.context_only, NotTrained.CONTEXT_ONLY),
    ):
        codes[condition] = REASONS.index(reason)
    return codes


def _prefix_turns(rule: ContextWindow, turns: TurnTable, summed: np.ndarray) -> np.ndarray:
    """How many turns each trajectory's prefix takes in, as the rule has it, up to the cap."""
    begin, end = turns.first_turn[:-1], turns.first_turn[1:]
    if rule.prefix == "task" or not len(begin):
        return np.zeros(len(begin), dtype=np.int64)
    if rule.prefix == "marked":
        run = np.minimum(turns.marked_turns, end - begin)
    else:
        ends = np.flatnonzero(~turns.reading)
        stop = np.searchsorted(ends, begin)
        run = np.minimum(np.append(ends, len(turns.reading))[stop], end) - begin
    room = rule.max_prefix_tokens - turns.initial_tokens
    fits = np.searchsorted(summed, summed[begin] + room, side="right") - 1 - begin
    taken: np.ndarray = np.maximum(np.minimum(run, fits), 0)
    return taken
