"""Rollouts to training samples, and the proof that both sides saw the same tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_klong.agent.episode import prompt_hash
from megatron_klong.data.blocks import TRAINED, TokenBlocks
from megatron_klong.data.windows import InsertedIds, TrainingSample, WindowAssembler
from megatron_klong.rollout.journal import PlayedTokens
from megatron_klong.window import ContextWindow, TrajectoryFacts, TurnFacts, Window


class ContextMismatchError(RuntimeError):
    """The engine did not see the tokens that training would use."""


@dataclass(frozen=True)
class Segment:
    """A window of a rollout as a training sample.

    Attributes:
        sample: tokens and loss mask.
        log_probs: of its trained tokens, in order, as the engine sampled them, float32.
    """

    sample: TrainingSample
    log_probs: np.ndarray


class ExperienceMaker:
    """Cuts played rollouts into the windows of the rule: the same code as for training data.

    Args:
        rule: the window rule of the live agent.
        inserted: opening, marker and note of the renderer.
    """

    def __init__(self, rule: ContextWindow, inserted: InsertedIds) -> None:
        self._rule = rule
        self._opening = len(inserted.opening_ids)
        self._assembler = WindowAssembler(rule, inserted)

    def segments(self, played: PlayedTokens, number: int) -> list[Segment]:
        """All windows of a rollout, each compared with the prompts that the engine saw.

        Args:
            played: the rollout's tokens.
            number: of the rollout in its batch.

        Raises:
            ContextMismatchError: a prompt was not what the window holds before its action.
        """
        sizes = np.diff(played.bounds).tolist()
        actions, answers = sizes[1::2], sizes[2::2]
        facts = tuple(
            TurnFacts(action - self._opening, answer, reading=bool(reading))
            for action, answer, reading in zip(actions, answers, played.reading, strict=True)
        )
        split = self._rule.split(TrajectoryFacts(sizes[0], facts))
        assert not split.not_trained, "a live action is never longer than its limit"
        blocks = TokenBlocks(played.tokens, self._marks(played), played.bounds)
        ends = np.cumsum([0, *(turn.action_tokens for turn in facts)])
        segments = []
        for window in split.windows:
            sample = self._assembler.sample(window, blocks, number)
            self._compare(window, sample, played)
            first, last = window.trained_turns[0], window.trained_turns[-1]
            segments.append(Segment(sample, played.log_probs[ends[first] : ends[last + 1]]))
            assert len(segments[-1].log_probs) == sample.loss_mask_T.sum()
        return segments

    def _marks(self, played: PlayedTokens) -> np.ndarray:
        marks = np.zeros(len(played.tokens), dtype=np.uint8)
        for block in range(1, len(played.bounds) - 1, 2):
            marks[played.bounds[block] + self._opening : played.bounds[block + 1]] = TRAINED
        return marks

    def _compare(self, window: Window, sample: TrainingSample, played: PlayedTokens) -> None:
        """Every prompt of the window's actions is the beginning of the window, and the action follows."""
        for turn in window.trained_turns:
            length = int(played.prompt_tokens[turn])
            action = played.tokens[played.bounds[2 * turn + 1] + self._opening : played.bounds[2 * turn + 2]]
            follows = sample.tokens_T[length : length + len(action)]
            if prompt_hash(sample.tokens_T[:length].tolist()) != str(played.prompt_sha256[turn]):
                raise ContextMismatchError(f"turn {turn}: the prompt of {length} tokens is not the window's")
            if (
                not np.array_equal(follows, action)
                or not sample.loss_mask_T[length : length + len(action)].all()
            ):
                raise ContextMismatchError(
                    f"turn {turn}: the action does not follow its prompt in the window"
                )
