"""Windows over a token store: facts for the rule, and the tokens of a window."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_klong.config import WindowConfig
from megatron_klong.data.blocks import TokenBlocks, TrajectoryLabel
from megatron_klong.window import (
    Context,
    ContextWindow,
    Split,
    TrajectoryFacts,
    TurnFacts,
    Window,
    truncate,
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


def trajectory_facts(
    lengths: np.ndarray, label: TrajectoryLabel, config: WindowConfig, opening: int
) -> TrajectoryFacts:
    """What the window rule may know of a stored trajectory.

    Raises:
        ValueError: the prefix rule is ``marked`` and the data gives no mark.
    """
    if config.prefix == "marked" and label.marked_turns is None:
        raise ValueError(f"trajectory {label.id!r}: window.prefix=marked needs prefix_messages in the data")
    sizes = lengths.tolist()
    facts = tuple(
        TurnFacts(
            action_tokens=action - opening,
            answer_tokens=answer,
            reading=bool(turn.tools) and set(turn.tools) <= set(config.reading_tools),
            context_only=turn.context_only,
        )
        for action, answer, turn in zip(sizes[1::2], sizes[2::2], label.turns, strict=True)
    )
    return TrajectoryFacts(sizes[0], facts, label.marked_turns or 0)


def split_trajectory(store: TokenStore, number: int, rule: ContextWindow, config: WindowConfig) -> Split:
    """The windows of one stored trajectory."""
    label = store.labels[number]
    facts = trajectory_facts(store.lengths(number), label, config, len(store.header.opening_ids))
    try:
        return rule.split(facts)
    except ValueError as error:
        raise ValueError(f"trajectory {label.id!r}: {error}") from error


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

    def sample(self, window: Window, trajectory: TokenBlocks, number: int) -> TrainingSample:
        """Tokens and loss mask of a window."""
        spans = self.spans(window, trajectory.bounds)
        tokens = np.concatenate([self.span_tokens(span, trajectory) for span in spans])
        masks = [
            trajectory.mask[span.start : span.stop].astype(bool)
            if span.trained
            else np.zeros(self.span_length(span), dtype=bool)
            for span in spans
        ]
        assert len(tokens) == window.tokens <= self._rule.max_tokens
        return TrainingSample(tokens, np.concatenate(masks), number, window.context.window)

    def span_tokens(self, span: Span, trajectory: TokenBlocks) -> np.ndarray:
        """The token ids of a stretch, int64."""
        inserted = self._inserted.get(span.kind)
        if inserted is not None:
            return inserted
        return trajectory.tokens[span.start : span.stop].astype(np.int64)

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
