"""The model as each rank of a layout would build it, in one process: Megatron's own modules, without memory.

The process takes one rank's part after another in a process group of torch's "fake" backend, which has any
size and sends nothing, and builds on the meta device, which has shapes and no data. So Megatron refuses what
it would refuse of the ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core import parallel_state
from torch.overrides import TorchFunctionMode

from megatron_klong.config import TrainerSettings
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.gpt import build_model
from megatron_klong.model.row_model import RankModel
from megatron_klong.training.initialize import set_up_layout


def model_of_rank(hf: DecoderConfig, settings: TrainerSettings, rank: int, ranks: int) -> RankModel:
    """What that rank would have; all of its tensors are on the meta device.

    Raises:
        ValueError: the layout cannot be.
    """
    settings.parallel.check(ranks)
    torch.distributed.init_process_group("fake", rank=rank, world_size=ranks)
    try:
        set_up_layout(settings.parallel, settings.seed, gloo_groups=False)
        with _on_meta():
            return build_model(hf, settings.parallel, settings.model, settings.row_tokens)
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextmanager
def _on_meta() -> Iterator[None]:
    with torch.device("meta"), _NamedDevices():
        yield


class _NamedDevices(TorchFunctionMode):
    """Sends to the meta device also what is made with a device's name."""

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = {"device": "meta"} if kwargs and kwargs.get("device") is not None else {}
        return func(*args, **{**(kwargs or {}), **named})
