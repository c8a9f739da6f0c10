"""What the window rule knows of a trajectory: counts and flags, never tokens or text."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class TurnFacts:
    """One turn: an assistant message and what answers it.

    Attributes:
        action_tokens: a, what the assistant produced, stop id included, role opening excluded.
        answer_tokens: o, the whole answer block, before any truncation.
        reading: all of its calls go to reading tools (and there is one).
        context_only: never trained, such as a copied or demonstration message.
    """

    action_tokens: int
    answer_tokens: int
    reading: bool = False
    context_only: bool = False


@dataclass(frozen=True)
class TrajectoryFacts:
    """A whole trajectory.

    Attributes:
        initial_tokens: the messages before the first action.
        turns: in order.
        marked_turns: for the prefix rule ``marked``, how many turns after the initial messages
            belong to the prefix.
    """

    initial_tokens: int
    turns: tuple[TurnFacts, ...]
    marked_turns: int = 0


class NotTrained(StrEnum):
    """Why an assistant message carries no loss in any window."""

    CONTEXT_ONLY = "context_only"
    ACTION_OVER_LIMIT = "action_over_limit"
    PREFIX_OVER_CAP = "prefix_over_cap"


@dataclass(frozen=True)
class Context:
    """What the model sees just before it generates the action of turn ``next_turn``.

    The sequence is: initial messages, turns ``0 .. prefix_turns - 1``, the marker if ``marker``,
    turns ``first_turn .. next_turn - 1``, then the opening of the assistant message.

    Attributes:
        window: number of the window, from 0.
        prefix_turns: turns pinned with the initial messages; 0 in the first window, where they
            are ordinary turns.
        first_turn: oldest turn shown after prefix and marker.
        first_new_turn: oldest turn whose action was generated in this window.
        next_turn: the turn about to be generated.
        marker: whether something was omitted.
        tokens: length of the sequence without the opening of the next assistant message.
    """

    window: int
    prefix_turns: int
    first_turn: int
    first_new_turn: int
    next_turn: int
    marker: bool
    tokens: int


@dataclass(frozen=True)
class Window:
    """A finished window as a training sample: it ends with the action of turn ``last_turn``.

    Attributes:
        context: what was seen before that last action.
        tokens: length of the sample.
        trained_turns: turns whose actions carry loss here.
    """

    context: Context
    tokens: int
    trained_turns: tuple[int, ...]

    @property
    def last_turn(self) -> int:
        """The turn whose action ends the window."""
        return self.context.next_turn


@dataclass(frozen=True)
class Split:
    """All windows of a trajectory, and the turns that none of them trains, with the reason."""

    windows: tuple[Window, ...]
    not_trained: tuple[tuple[int, NotTrained], ...]
