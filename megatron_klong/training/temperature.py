"""Log-probs after a sampling temperature."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_klong.training.trainer import Trainer


@contextmanager
def at_temperature(trainer: Trainer, temperature: float) -> Iterator[None]:
    """Within, the model's logits are divided by ``temperature``, forward and backward.

    What enters the output layer is divided, which is the same, since it has no bias.
    """
    head = trainer.model[-1]
    before, head.temperature = head.temperature, temperature
    try:
        yield
    finally:
        head.temperature = before
