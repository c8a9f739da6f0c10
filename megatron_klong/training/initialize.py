"""Process groups, parallel state and seeds of a rank."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from math import ceil

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_klong.config import ParallelConfig
from megatron_klong.platform import Platform, activate


@contextmanager
def distributed(
    parallel: ParallelConfig,
    seed: int,
    *,
    timeout_seconds: float | None = None,
    init_method: str = "env://",
    rank: int = -1,
    world_size: int = -1,
) -> Iterator[Platform]:
    """Join the process group and set up Megatron's parallel state; leave both at the end.

    Args:
        parallel: the layout. The world size must be a multiple of what it needs.
        seed: for Megatron's RNG tracker.
        timeout_seconds: after which a collective operation of any group fails; default as torch and Megatron
            have it.
        init_method: rendezvous; the default reads torchrun's environment.
        rank, world_size: for a rendezvous that does not know them.

    Raises:
        ValueError: the layout does not divide the world.
    """
    platform = activate()
    torch.distributed.init_process_group(
        platform.backend,
        init_method=init_method,
        rank=rank,
        world_size=world_size,
        timeout=None if timeout_seconds is None else timedelta(seconds=timeout_seconds),
    )
    try:
        parallel.check(torch.distributed.get_world_size())
        set_up_layout(parallel, seed, timeout_seconds=timeout_seconds)
        yield platform
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def set_up_layout(
    parallel: ParallelConfig, seed: int, *, gloo_groups: bool = True, timeout_seconds: float | None = None
) -> None:
    """Megatron's parallel state and RNG tracker in the process group that there is.

    Args:
        gloo_groups: make groups of their own for what is sent from host memory.
    """
    # Megatron's groups do not take over the timeout of the one that they are of.
    minutes = {} if timeout_seconds is None else {"distributed_timeout_minutes": ceil(timeout_seconds / 60)}
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual if parallel.virtual > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        create_gloo_process_groups=gloo_groups,
        **minutes,
    )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)


def seed_step(seed: int, step: int) -> None:
    """Set all random numbers of a step from its number and the data-parallel rank.

    So a run that resumes draws what it would have drawn, without a state to keep, at any layout that has as
    many data-parallel ranks.
    """
    drawn = np.random.SeedSequence([seed, step, parallel_state.get_data_parallel_rank()]).generate_state(1)
    number = int(drawn[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)
    model_parallel_cuda_manual_seed(number, force_reset_rng=True)
