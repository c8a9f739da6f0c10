"""The log of a supervised run, as its config wants it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from megatron_klong.config import SftConfig
from megatron_klong.platform import Platform
from megatron_klong.training.device_peaks import peak_tflops
from megatron_klong.training.metrics import RunLog, Speed, print_line
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.sinks import Sink, tensorboard_sink, wandb_sink


@contextmanager
def open_log(
    config: SftConfig, run: RunDirectory, done: int, steps: int, platform: Platform
) -> Iterator[RunLog]:
    """The log, open; only the first rank's goes anywhere.

    Args:
        done: steps that are done already.
        steps: of the whole run.
    """
    writes = torch.distributed.get_rank() == 0
    peak = config.log.peak_tflops or peak_tflops(platform.device, config.model.precision)
    sinks: list[Sink] = []
    with ExitStack() as stack:
        if writes and config.log.tensorboard:
            sinks.append(stack.enter_context(tensorboard_sink(run.tensorboard, done + 1)))
        if writes and config.log.wandb is not None:
            shown = config.model_dump(mode="json")
            opened = wandb_sink(config.log.wandb, run.wandb, run.lineage(), shown, print_line)
            sinks.append(stack.enter_context(opened))
        log = RunLog(
            run.metrics, run.said, writes=writes, total_steps=steps, log_every=config.log.every,
            speed=Speed(torch.distributed.get_world_size(), peak), sinks=sinks,
        )  # fmt: skip
        with log:
            yield log
