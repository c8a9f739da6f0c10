"""The context of a live episode: the token sequences that the window rule prescribes, turn by turn."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_klong.window import ContextWindow, TurnFacts, truncate_ids


class LiveContext:
    """Follows one episode; :meth:`prompt` is what the model sees next.

    Made of the same rule as training windows (:mod:`megatron_klong.data.windows`), so both are the same
    token sequences.

    Args:
        rule: the window rule.
        initial_ids: the messages before the first action.
        opening_ids: what opens an assistant message.
        marker_ids: the message that stands where turns are omitted.
        note_ids: what stands where a block was cut.

    Raises:
        ValueError: the initial messages alone exceed the prefix cap.
    """

    def __init__(
        self, rule: ContextWindow, *, initial_ids: Sequence[int], opening_ids: Sequence[int],
        marker_ids: Sequence[int], note_ids: Sequence[int],
    ) -> None:  # fmt: skip
        self._rule = rule
        self._initial = tuple(initial_ids)
        self._opening = tuple(opening_ids)
        self._marker = tuple(marker_ids)
        self._note = tuple(note_ids)
        self._turns: list[tuple[int, ...]] = []
        self._cursor = rule.open(len(self._initial))

    def prompt(self) -> tuple[int, ...]:
        """The sequence after which the next action is generated."""
        context = self._cursor.context
        shown = [*range(context.prefix_turns), *range(context.first_turn, context.next_turn)]
        ids = list(self._initial)
        for place, turn in enumerate(shown):
            if context.marker and place == context.prefix_turns:
                ids += self._marker
            ids += self._turns[turn]
        assert len(ids) == context.tokens
        return (*ids, *self._opening)

    def advance(
        self, action_ids: Sequence[int], answer_ids: Sequence[int], *, reading: bool
    ) -> tuple[int, ...]:
        """A turn is complete.

        Args:
            action_ids: as sampled, the opening left out, at most G.
            answer_ids: the whole answer block.
            reading: all its calls went to reading tools.

        Returns:
            The answer block as it stands in contexts, cut to its cap.
        """
        assert len(action_ids) <= self._rule.reserve_generation
        answer = truncate_ids(answer_ids, self._rule.reserve_observation, self._note)
        self._turns.append((*self._opening, *action_ids, *answer))
        self._cursor.advance(TurnFacts(len(action_ids), len(answer), reading=reading))
        return answer
