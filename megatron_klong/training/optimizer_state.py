"""Loading Megatron's distributed optimizer, wherever its moments are and whosever Adam it is.

Without Transformer Engine and Apex, Megatron 0.16 uses torch's AdamW, which keeps a ``step`` tensor for every
parameter. Its checkpoint code cannot load moments beside a step, and hands all parameters one shared step
tensor, which an update would count up once per parameter. With any Adam it brings all moments to the device.
These functions go around that through the optimizer's public methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.optim import Optimizer

from megatron_klong.training.moments import MOMENTS


def load_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Load what ``optimizer.sharded_state_dict`` described, in the format ``fully_reshardable``."""
    parts = optimizer.chained_optimizers
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        moments = state["param_state"]
        kind = state["param_state_sharding_type"]
        assert kind == "fully_reshardable", kind
        rest = {key: value for key, value in state.items() if not key.startswith("param_state")}
        with _moments_aside(part.optimizer):
            part.load_state_dict(rest)
        with _steps_aside(part.optimizer):
            part.load_parameter_state_from_fully_reshardable(moments)


@contextmanager
def _moments_aside(adam: Optimizer) -> Iterator[None]:
    """Take the moments out of the state, whose own loading would bring them to the device."""
    aside = {weight: {name: state.pop(name) for name in MOMENTS} for weight, state in adam.state.items()}
    yield
    for weight, moments in aside.items():
        adam.state[weight] |= moments


@contextmanager
def _steps_aside(adam: Optimizer) -> Iterator[None]:
    """Take the step tensors out of the state; afterwards each parameter has one of its own."""
    steps = {weight: state.pop("step") for weight, state in adam.state.items() if "step" in state}
    yield
    for weight, step in steps.items():
        adam.state[weight]["step"] = step.clone()
