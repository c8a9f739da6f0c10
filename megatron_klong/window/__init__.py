"""What a model sees at a turn: one rule for training windows and live contexts."""

from megatron_klong.window.context import ContextWindow, WindowCursor
from megatron_klong.window.facts import (
    Context,
    NotTrained,
    Split,
    TrajectoryFacts,
    TurnFacts,
    Window,
)
from megatron_klong.window.table import (
    REASONS,
    TurnTable,
    WindowTable,
    turn_table,
    window_table,
)
from megatron_klong.window.truncation import Kept, truncate, truncate_ids

__all__ = [
    "REASONS",
    "TurnTable",
    "WindowTable",
    "turn_table",
    "window_table",
    "Context",
    "ContextWindow",
    "Kept",
    "NotTrained",
    "Split",
    "TrajectoryFacts",
    "TurnFacts",
    "Window",
    "WindowCursor",
    "truncate",
    "truncate_ids",
]
