"""The context window: THE rule of what a model sees at a turn (design, section 3).

Only the past decides. The cursor follows a live rollout; finished trajectories are split all at once by
:mod:`megatron_klong.window.table`, and give the same sequences.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from megatron_klong.config import PrefixRule, UntrainablePolicy, WindowConfig
from megatron_klong.window.facts import Context, NotTrained, Split, TrajectoryFacts, TurnFacts
from megatron_klong.window.table import REASONS, TurnTable, WindowTable, turn_table, window_table


@dataclass(frozen=True, kw_only=True)
class ContextWindow:
    """The window rule with its sizes, all in tokens.

    Attributes:
        max_tokens: L.
        overlap_tokens: O.
        reserve_generation: G, the most an action may take.
        reserve_observation: B, the cap of an answer block.
        max_prefix_tokens: P_max.
        marker_tokens: m, what stands where history is omitted.
        opener_tokens: what opens every assistant message (its role token). It is context, and is
            counted with the action wherever room is reserved for one.
        note_tokens: what stands where a block was cut.
        prefix: the prefix rule.
        untrainable: policy for what cannot be trained.

    Raises:
        ValueError: unless P_max + m + max(O, G + B) + G <= L, with the opener counted in each G:
            otherwise a window might never hold a new turn.
    """

    max_tokens: int
    overlap_tokens: int
    reserve_generation: int
    reserve_observation: int
    max_prefix_tokens: int
    marker_tokens: int = 0
    opener_tokens: int = 0
    note_tokens: int = 0
    prefix: PrefixRule = "task"
    untrainable: UntrainablePolicy = "drop"

    @classmethod
    def from_config(
        cls, config: WindowConfig, *, marker_tokens: int, opener_tokens: int, note_tokens: int
    ) -> ContextWindow:
        """The rule for a config and the token counts of a renderer."""
        return cls(
            max_tokens=config.max_tokens,
            overlap_tokens=config.overlap_tokens,
            reserve_generation=config.reserve_generation,
            reserve_observation=config.reserve_observation,
            max_prefix_tokens=int(config.max_tokens * config.max_prefix_fraction),
            marker_tokens=marker_tokens,
            opener_tokens=opener_tokens,
            note_tokens=note_tokens,
            prefix=config.prefix,
            untrainable=config.untrainable,
        )

    def __post_init__(self) -> None:
        turn = self.action_room + self.reserve_observation
        needed = (
            self.max_prefix_tokens + self.marker_tokens + max(self.overlap_tokens, turn) + self.action_room
        )
        if needed > self.max_tokens:
            raise ValueError(
                f"window: max_tokens={self.max_tokens} is too small: prefix cap "
                f"{self.max_prefix_tokens} + marker {self.marker_tokens} + max(overlap_tokens "
                f"{self.overlap_tokens}, one turn {turn}) + reserve_generation with opening "
                f"{self.action_room} = {needed}; lower max_prefix_fraction, overlap_tokens, "
                "reserve_generation or reserve_observation, or raise max_tokens"
            )
        smallest = min(self.reserve_generation, self.reserve_observation)
        if self.note_tokens >= smallest:
            raise ValueError(
                f"window: reserve_generation={self.reserve_generation} and reserve_observation="
                f"{self.reserve_observation} must exceed the truncation note of "
                f"{self.note_tokens} tokens"
            )

    @property
    def action_room(self) -> int:
        """Room for one action with its opening."""
        return self.opener_tokens + self.reserve_generation

    def turn_tokens(self, turn: TurnFacts) -> int:
        """A turn as it stands in a context, over-long blocks cut."""
        return self.action_in_context(turn) + min(turn.answer_tokens, self.reserve_observation)

    def action_in_context(self, turn: TurnFacts) -> int:
        """An action with its opening as it stands in a context."""
        return self.opener_tokens + min(turn.action_tokens, self.reserve_generation)

    def open(self, initial_tokens: int, marked_turns: int = 0) -> WindowCursor:
        """Begin a trajectory.

        Raises:
            ValueError: the initial messages alone exceed the prefix cap.
        """
        if initial_tokens > self.max_prefix_tokens:
            raise ValueError(
                f"window: the initial messages have {initial_tokens} tokens, over the prefix cap of "
                f"{self.max_prefix_tokens} (max_prefix_fraction of max_tokens={self.max_tokens})"
            )
        return WindowCursor(self, initial_tokens, marked_turns)

    def split(self, facts: TrajectoryFacts) -> Split:
        """Cut a finished trajectory into windows.

        Raises:
            ValueError: with ``untrainable="error"``, for anything that cannot be trained by size.
        """
        turns = turn_table([facts])
        table = window_table(self, turns)
        self.require_trainable(turns, table, 0)
        reasons = enumerate(table.reasons.tolist())
        return Split(
            windows=tuple(table.window(place) for place in range(len(table))),
            not_trained=tuple((number, reason) for number, code in reasons if (reason := REASONS[code])),
        )

    def require_trainable(self, turns: TurnTable, table: WindowTable, trajectory: int) -> None:
        """Under the policy ``error``, refuse (ValueError) a trajectory with anything over its limit."""
        if self.untrainable != "error":
            return
        initial = int(turns.initial_tokens[trajectory])
        if initial > self.max_prefix_tokens:
            self.open(initial)
        first, last = turns.first_turn[trajectory : trajectory + 2]
        over = REASONS.index(NotTrained.ACTION_OVER_LIMIT)
        found = np.flatnonzero(table.reasons[first:last] == over)
        if len(found):
            raise ValueError(
                f"window: the action of turn {found[0]} has {turns.action_tokens[first + found[0]]} tokens, "
                f"over reserve_generation={self.reserve_generation}; raise it, or set untrainable=drop"
            )


class WindowCursor:
    """Follows one trajectory, turn by turn; ``context`` is what the model sees next."""

    def __init__(self, rule: ContextWindow, initial_tokens: int, marked_turns: int) -> None:
        self._rule = rule
        self._marked_turns = marked_turns
        self._prefix_tokens = initial_tokens
        self._prefix_turns = 0
        self._prefix_grows = rule.prefix != "task"
        self._sizes: list[int] = []
        self.context = Context(
            window=0,
            prefix_turns=0,
            first_turn=0,
            first_new_turn=0,
            next_turn=0,
            marker=False,
            tokens=initial_tokens,
        )

    def advance(self, turn: TurnFacts) -> Context:
        """The next turn is complete, its answer included: the context for the action after it."""
        size = self._rule.turn_tokens(turn)
        self._sizes.append(size)
        self._grow_prefix(turn, size)
        self.context = replace(self.context, next_turn=len(self._sizes), tokens=self.context.tokens + size)
        if self.context.tokens + self._rule.action_room > self._rule.max_tokens:
            self.context = self._slide()
        return self.context

    def _grow_prefix(self, turn: TurnFacts, size: int) -> None:
        """Take the turn into the prefix while the initial run of such turns lasts, up to the cap."""
        if not self._prefix_grows:
            return
        marked = self._prefix_turns < self._marked_turns
        belongs = turn.reading if self._rule.prefix == "reading" else marked
        if belongs and self._prefix_tokens + size <= self._rule.max_prefix_tokens:
            self._prefix_tokens += size
            self._prefix_turns += 1
        else:
            self._prefix_grows = False

    def _slide(self) -> Context:
        """The next window: prefix, marker, the last turn whole, older whole turns up to O."""
        self._prefix_grows = False
        first = len(self._sizes) - 1
        kept = self._sizes[first]
        limit = max(self._rule.overlap_tokens, kept)
        while first > self._prefix_turns and kept + self._sizes[first - 1] <= limit:
            first -= 1
            kept += self._sizes[first]
        # A full window holds more than any prefix and overlap, so sliding always omits a turn.
        assert first > self._prefix_turns
        tokens = self._prefix_tokens + self._rule.marker_tokens + kept
        assert tokens + self._rule.action_room <= self._rule.max_tokens
        return Context(
            window=self.context.window + 1,
            prefix_turns=self._prefix_turns,
            first_turn=first,
            first_new_turn=len(self._sizes),
            next_turn=len(self._sizes),
            marker=True,
            tokens=tokens,
        )
