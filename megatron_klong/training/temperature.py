"""Log-probs after a sampling temperature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_klong.training.trainer import Trainer


@contextmanager
def at_temperature(trainer: Trainer, temperature: float) -> Iterator[None]:
    """Within, the model's logits are divided by ``temperature``, forward and backward.

    What enters the output layer is divided, which is the same, since it has no bias.
    """
    model = trainer.model.module
    if temperature == 1.0 or not model.post_process:
        yield
        return

    def cool(_layer: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden, *rest = inputs
        return (hidden / temperature, *rest)

    hook = model.output_layer.register_forward_pre_hook(cool)
    try:
        yield
    finally:
        hook.remove()
