"""Process groups, parallel state and seeds of a rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
    init_method: str = "env://",
    rank: int = -1,
    world_size: int = -1,
) -> Iterator[Platform]:
    """Join the process group and set up Megatron's parallel state; leave both at the end.

    Args:
        parallel: the layout. The world size must be a multiple of what it needs.
        seed: for Megatron's RNG tracker.
        init_method: rendezvous; the default reads torchrun's environment.
        rank, world_size: for a rendezvous that does not know them.

    Raises:
        ValueError: the layout does not divide the world.
    """
    platform = activate()
    torch.distributed.init_process_group(
        platform.backend, init_method=init_method, rank=rank, world_size=world_size
    )
    try:
        parallel.check(torch.distributed.get_world_size())
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=1,
        )
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield platform
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
