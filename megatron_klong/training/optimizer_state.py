"""Loading Megatron's distributed optimizer where it runs on torch's AdamW.

Without Transformer Engine and Apex, Megatron 0.16 uses torch's AdamW, which keeps a ``step`` tensor
for every parameter. Its checkpoint code then asks for steps before there are any, cannot load
moments beside a step, and hands all parameters one shared step tensor, which an update would count
up once per parameter. These functions go around that through the optimizer's public methods; with
the fused optimizers, which have no such tensor, they change nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def allocate_moments(optimizer: Any) -> None:
    """Give the optimizer the state it has after a first step, so that there is something to load into."""
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, torch.optim.AdamW):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def load_optimizer(optimizer: Any, loaded: dict[Any, Any]) -> None:
    """Load what ``optimizer.sharded_state_dict`` described, in the format ``fully_reshardable``."""
    parts = optimizer.chained_optimizers
    states = [loaded] if len(parts) == 1 else [loaded[number] for number in range(len(parts))]
    for part, state in zip(parts, states, strict=True):
        moments = state["param_state"]
        kind = state["param_state_sharding_type"]
        assert kind == "fully_reshardable", kind
        rest = {key: value for key, value in state.items() if not key.startswith("param_state")}
        part.load_state_dict(rest)
        with _steps_aside(part.optimizer):
            part.load_parameter_state_from_fully_reshardable(moments)


@contextmanager
def _steps_aside(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Take the step tensors out of the state; afterwards each parameter has one of its own."""
    steps = {parameter: state.pop("step") for parameter, state in optimizer.state.items() if "step" in state}
    yield
    for parameter, step in steps.items():
        optimizer.state[parameter]["step"] = step.clone()
