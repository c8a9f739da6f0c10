"""Budget clocks: how much of its time an episode has used (design, Stages and time)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class BudgetReport:
    """What an episode used of its budget, in units of its clock.

    Attributes:
        unit: ``seconds`` or ``tokens``.
        limit: of the stage.
        generation, tools: the parts of what was used.
    """

    unit: str
    limit: float
    generation: float
    tools: float


class BudgetClock(Protocol):
    """Charges what an episode does against its limit."""

    def generated(self, tokens: int, seconds: float) -> None:
        """An action of so many tokens took so long; waits that were not its own are left out."""
        ...

    def used_tool(self, seconds: float) -> None:
        """A tool call took so long."""
        ...

    def seconds_left(self) -> float | None:
        """What one operation may take at most; None where seconds do not count."""
        ...

    @property
    def expired(self) -> bool:
        """Whether the budget is used up."""
        ...

    def report(self) -> BudgetReport:
        """What was used."""
        ...


class WallClock:
    """Seconds of generation and of tools. What the engine was paused or shut for is not charged."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._generation = self._tools = 0.0

    def generated(self, tokens: int, seconds: float) -> None:
        self._generation += seconds

    def used_tool(self, seconds: float) -> None:
        self._tools += seconds

    def seconds_left(self) -> float | None:
        return max(0.0, self._limit - self._generation - self._tools)

    @property
    def expired(self) -> bool:
        return self._generation + self._tools >= self._limit

    def report(self) -> BudgetReport:
        return BudgetReport("seconds", self._limit, self._generation, self._tools)


class TokenClock:
    """Generated tokens, and a fixed price for each tool call: the same on every machine."""

    def __init__(self, limit_tokens: float, tokens_per_call: float) -> None:
        self._limit = limit_tokens
        self._per_call = tokens_per_call
        self._generation = self._tools = 0.0

    def generated(self, tokens: int, seconds: float) -> None:
        self._generation += tokens

    def used_tool(self, seconds: float) -> None:
        self._tools += self._per_call

    def seconds_left(self) -> float | None:
        return None

    @property
    def expired(self) -> bool:
        return self._generation + self._tools >= self._limit

    def report(self) -> BudgetReport:
        return BudgetReport("tokens", self._limit, self._generation, self._tools)
