"""Windows over a token store: facts for the rule, and the tokens of a window."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_klong.config import WindowConfig
from megatron_klong.data.blocks import TRAINED, TokenBlocks
from megatron_klong.window import (
    Context,
    ContextWindow,
    TurnTable,
    Window,
    WindowTable,
    truncate,
    window_table,
)

if TYPE_CHECKING:
    from megatron_klong.data.store import TokenStore


class InsertedIds(Protocol):
    """Token ids that stand in windows beside those of the trajectory; a store's header has them."""

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """What opens an assistant message."""
        ...

    @property
    def marker_ids(self) -> tuple[int, ...]:
        """The message that stands where turns are omitted."""
        ...

    @property
    def note_ids(self) -> tuple[int, ...]:
        """What stands where a block was cut."""
        ...


@dataclass(frozen=True)
class TrainingSample:
    """What the trainer trains on: one window of a trajectory, or one segment of a rollout.

    Attributes:
        tokens_T: int64.
        loss_mask_T: bool; True where the token itself is a target.
        trajectory: number in its source.
        window: number of the window.
    """

    tokens_T: np.ndarray
    loss_mask_T: np.ndarray
    trajectory: int
    window: int

    @property
    def length(self) -> int:
        """In tokens."""
        return len(self.tokens_T)

    @property
    def name(self) -> tuple[int, int]:
        """Numbers of its trajectory and window."""
        return self.trajectory, self.window

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        """Write it into arrays of its length."""
        tokens[:], loss_mask[:] = self.tokens_T, self.loss_mask_T


class SpanKind(StrEnum):
    """What a stretch of a window is."""

    PREFIX = "prefix"
    MARKER = "marker"
    OVERLAP = "overlap"
    CONTEXT = "context"
    ACTION = "action"
    NOTE = "note"


@dataclass(frozen=True)
class Span:
    """A stretch of a window.

    Attributes:
        start, stop: token range in the trajectory; empty for the inserted kinds, marker and note.
        turn: the turn it belongs to, None for initial messages and the marker.
        trained: whether the loss mask of the store applies here.
    """

    kind: SpanKind
    start: int
    stop: int
    turn: int | None
    trained: bool = False


def store_turns(store: TokenStore, config: WindowConfig, numbers: np.ndarray | None = None) -> TurnTable:
    """The facts of all turns of a store, or of some of its trajectories.

    Raises:
        ValueError: the prefix rule is ``marked`` and the data gives no mark.
    """
    chosen = np.arange(len(store)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    first_block = store.first_blocks[chosen]
    counts = (store.first_blocks[chosen + 1] - first_block - 1) // 2
    first_turn = np.concatenate([[0], np.cumsum(counts)])
    # The block of each turn's action, and its place among all turns of the store.
    within = np.arange(first_turn[-1]) - np.repeat(first_turn[:-1], counts)
    action = np.repeat(first_block + 1, counts) + 2 * within
    marks = store.turn_marks[np.repeat((first_block - chosen) // 2, counts) + within]
    reading = set(config.reading_tools)
    reads = np.array([bool(tools) and set(tools) <= reading for tools in store.header.tool_sets], dtype=bool)
    lengths = store.block_lengths
    return TurnTable(
        first_turn=first_turn,
        initial_tokens=lengths[first_block].astype(np.int64),
        marked_turns=_marked_turns(store, chosen, config),
        action_tokens=lengths[action].astype(np.int64) - len(store.header.opening_ids),
        answer_tokens=lengths[action + 1].astype(np.int64),
        reading=reads[marks // 2],
        context_only=marks % 2 == 1,
    )


def _marked_turns(store: TokenStore, chosen: np.ndarray, config: WindowConfig) -> np.ndarray:
    if config.prefix != "marked":
        return np.zeros(len(chosen), dtype=np.int64)
    marked = [store.labels[number].marked_turns for number in chosen.tolist()]
    for number, mark in zip(chosen.tolist(), marked):
        if mark is None:
            raise ValueError(
                f"trajectory {store.labels[number].id!r}: window.prefix=marked needs prefix_messages in the "
                "data"
            )
    return np.array(marked, dtype=np.int64)


@dataclass(frozen=True)
class StoreWindows:
    """The windows of a store, or of some of its trajectories.

    Attributes:
        table: its ``trajectory`` is a place in ``numbers``.
        turns: what it was made of.
        numbers: of the trajectories in the store.
    """

    table: WindowTable
    turns: TurnTable
    numbers: np.ndarray


def split_store(
    store: TokenStore, rule: ContextWindow, config: WindowConfig, numbers: np.ndarray | None = None
) -> StoreWindows:
    """Cut trajectories of a store into windows.

    Raises:
        ValueError: with ``untrainable="error"``, names a trajectory and what cannot be trained of it.
    """
    chosen = np.arange(len(store)) if numbers is None else np.asarray(numbers, dtype=np.int64)
    turns = store_turns(store, config, chosen)
    table = window_table(rule, turns)
    if rule.untrainable == "error":
        for place, number in enumerate(chosen.tolist()):
            try:
                rule.require_trainable(turns, table, place)
            except ValueError as error:
                raise ValueError(f"trajectory {store.labels[number].id!r}: {error}") from error
    return StoreWindows(table, turns, chosen)


@dataclass(frozen=True)
class Stretch:
    """Tokens that a window takes as they stand: of the trajectory, or inserted ones.

    Attributes:
        start, stop: token range in the trajectory.
        inserted: ids in its place.
        trained: whether marks of the trajectory apply here.
    """

    start: int
    stop: int
    inserted: np.ndarray | None = None
    trained: bool = False

    @property
    def length(self) -> int:
        """In tokens."""
        return self.stop - self.start if self.inserted is None else len(self.inserted)


class WindowAssembler:
    """Turns the description of a window into spans and tokens."""

    def __init__(self, rule: ContextWindow, inserted: InsertedIds) -> None:
        self._rule = rule
        self._opening = len(inserted.opening_ids)
        self._inserted = {
            SpanKind.MARKER: np.array(inserted.marker_ids, dtype=np.int64),
            SpanKind.NOTE: np.array(inserted.note_ids, dtype=np.int64),
        }

    def spans(self, window: Window, bounds: np.ndarray) -> list[Span]:
        """The stretches of a window in order; ``bounds`` as in :class:`TokenBlocks`."""
        context, trained = window.context, set(window.trained_turns)
        spans = [Span(SpanKind.PREFIX, 0, int(bounds[1]), None)]
        for turn in range(context.prefix_turns):
            spans += self._turn(turn, bounds, SpanKind.PREFIX, trained=False)
        if context.marker:
            spans.append(Span(SpanKind.MARKER, 0, 0, None))
        for turn in range(context.first_turn, window.last_turn):
            kind = _kind(turn, context)
            spans += self._turn(turn, bounds, kind, turn in trained)
        last = window.last_turn
        spans += self._block(2 * last + 1, last, bounds, _kind(last, context), last in trained)
        return spans

    def stretches(self, window: Window, bounds: np.ndarray) -> list[Stretch]:
        """The same as few stretches as possible: what stands together in the trajectory stays together."""
        context = window.context
        found = [Stretch(0, int(bounds[1]))]  # initial messages are never cut
        if context.prefix_turns:
            found += self._run(1, 2 * context.prefix_turns, bounds, trained=False)
        if context.marker:
            found.append(Stretch(0, 0, self._inserted[SpanKind.MARKER]))
        first = 2 * context.first_turn + 1 if context.marker else 1
        new, last = 2 * context.first_new_turn + 1, 2 * window.last_turn + 1
        if first < new:
            found += self._run(first, new - 1, bounds, trained=False)
        return found + self._run(max(first, new), last, bounds, trained=True)

    def _run(self, first: int, last: int, bounds: np.ndarray, trained: bool) -> list[Stretch]:
        """Blocks ``first`` to ``last``, cut where one of them is over its cap."""
        found: list[Stretch] = []
        start = int(bounds[first])
        lengths = bounds[first + 1 : last + 2] - bounds[first : last + 1]
        action_cap = self._opening + self._rule.reserve_generation
        if lengths.max() <= min(action_cap, self._rule.reserve_observation):
            return [Stretch(start, int(bounds[last + 1]), trained=trained)]
        caps = np.where(np.arange(first, last + 1) % 2, action_cap, self._rule.reserve_observation)
        for place in np.flatnonzero(lengths > caps).tolist():
            block = first + place
            free = self._opening if block % 2 else 0
            kept = truncate(int(lengths[place]) - free, int(caps[place]) - free, self._rule.note_tokens)
            head = int(bounds[block]) + free + kept.head
            # An action over its cap is never trained; an answer carries no loss anyway.
            found += [
                Stretch(start, int(bounds[block]), trained=trained),
                Stretch(int(bounds[block]), head),
                Stretch(0, 0, self._inserted[SpanKind.NOTE]),
                Stretch(int(bounds[block + 1]) - kept.tail, int(bounds[block + 1])),
            ]
            start = int(bounds[block + 1])
        return [*found, Stretch(start, int(bounds[last + 1]), trained=trained)]

    def write(
        self, window: Window, trajectory: TokenBlocks, tokens: np.ndarray, loss_mask: np.ndarray
    ) -> None:
        """Write tokens and loss mask of a window into arrays of its length."""
        place = 0
        for stretch in self.stretches(window, trajectory.bounds):
            stop = place + stretch.length
            if stretch.inserted is not None:
                tokens[place:stop] = stretch.inserted
            else:
                tokens[place:stop] = trajectory.tokens[stretch.start : stretch.stop]
            if stretch.trained:
                marks = trajectory.marks[stretch.start : stretch.stop]
                np.greater_equal(marks, TRAINED, out=loss_mask[place:stop])
            else:
                loss_mask[place:stop] = 0
            place = stop
        assert place == window.tokens <= self._rule.max_tokens

    def sample(self, window: Window, trajectory: TokenBlocks, number: int) -> TrainingSample:
        """Tokens and loss mask of a window."""
        tokens, mask = np.empty(window.tokens, dtype=np.int64), np.empty(window.tokens, dtype=bool)
        self.write(window, trajectory, tokens, mask)
        return TrainingSample(tokens, mask, number, window.context.window)

    def stored(self, window: Window, trajectory: TokenBlocks, number: int, called: str) -> StoredWindow:
        """The same, not copied yet; ``called`` is the trajectory's name in reports."""
        return StoredWindow(self, window, trajectory, number, called)

    def span_length(self, span: Span) -> int:
        """Its length in tokens."""
        inserted = self._inserted.get(span.kind)
        return span.stop - span.start if inserted is None else len(inserted)

    def _turn(self, turn: int, bounds: np.ndarray, kind: SpanKind, trained: bool) -> list[Span]:
        answer_kind = SpanKind.CONTEXT if kind is SpanKind.ACTION else kind
        action = self._block(2 * turn + 1, turn, bounds, kind, trained)
        return action + self._block(2 * turn + 2, turn, bounds, answer_kind, False)

    def _block(self, block: int, turn: int, bounds: np.ndarray, kind: SpanKind, trained: bool) -> list[Span]:
        """A block, cut to its cap; the opening of an action does not count against the cap."""
        start, stop = int(bounds[block]), int(bounds[block + 1])
        is_action = block % 2 == 1
        free = self._opening if is_action else 0
        cap = self._rule.reserve_generation if is_action else self._rule.reserve_observation
        kept = truncate(stop - start - free, cap, self._rule.note_tokens)
        if kept.whole:
            return [Span(kind, start, stop, turn, trained)] if stop > start else []
        assert not trained, "an action over the limit is never trained"
        return [
            Span(kind, start, start + free + kept.head, turn),
            Span(SpanKind.NOTE, 0, 0, turn),
            Span(kind, stop - kept.tail, stop, turn),
        ]


def _kind(turn: int, context: Context) -> SpanKind:
    return SpanKind.ACTION if turn >= context.first_new_turn else SpanKind.OVERLAP


@dataclass(frozen=True)
class StoredWindow:
    """A window of a stored trajectory, written where it is wanted."""

    assembler: WindowAssembler
    window: Window
    blocks: TokenBlocks
    trajectory: int
    called: str

    @property
    def length(self) -> int:
        """In tokens."""
        return self.window.tokens

    @property
    def name(self) -> tuple[str, int]:
        """Its trajectory's name, and its number."""
        return self.called, self.window.context.window

    def write(self, tokens: np.ndarray, loss_mask: np.ndarray) -> None:
        """Write it into arrays of its length."""
        self.assembler.write(self.window, self.blocks, tokens, loss_mask)
