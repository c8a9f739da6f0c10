"""Settings of the context window (design, section 3)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_klong.config.base import StrictModel

PrefixRule = Literal["task", "reading", "marked"]
UntrainablePolicy = Literal["drop", "error"]


class WindowConfig(StrictModel):
    """What a model sees at a turn, when splitting trajectories and in live rollouts alike."""

    max_tokens: int = Field(gt=0)
    """L: the context length. No window is longer."""

    overlap_tokens: int = Field(ge=0)
    """O: how much history a new window takes over at most, in whole turns. The last turn is always
    taken over, even where it is longer."""

    reserve_generation: int = Field(gt=0)
    """G: the engine's max_tokens for one action. A window closes when less than this is left."""

    reserve_observation: int = Field(gt=0)
    """B: the cap of an answer block. A longer one keeps its head and tail around a note."""

    prefix: PrefixRule = "task"
    """What stays in every window: `task` (the messages before the first action), `reading`
    (further through the initial run of turns that only call reading tools), `marked` (as many
    messages as the data's `prefix_messages` says)."""

    reading_tools: tuple[str, ...] = ("read_paper",)
    """Tools whose calls make a turn a reading turn, for `prefix: reading`."""

    max_prefix_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Cap of the prefix, as a share of max_tokens."""

    untrainable: UntrainablePolicy = "drop"
    """What to do with what cannot be trained (an action longer than reserve_generation, a prefix
    over its cap): `drop` counts and reports it, `error` stops."""
