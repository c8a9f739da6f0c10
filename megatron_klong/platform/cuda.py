"""One rank, one GPU. Not yet run on real hardware by this project."""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch

from megatron_klong.platform.base import Platform


def install() -> Platform:
    """Bind this process to the GPU of its local rank.

    Raises:
        ValueError: it has none.
    """
    device = torch.device("cuda", own_device(os.environ, torch.cuda.device_count()))
    torch.cuda.set_device(device)
    return Platform(name="cuda", device=device, backend="nccl")


def own_device(environment: Mapping[str, str], devices: int) -> int:
    """Number of the GPU of a rank (``LOCAL_RANK``, 0 where unset).

    Args:
        devices: that it sees.

    Raises:
        ValueError: ranks before it have taken them all.
    """
    number = int(environment.get("LOCAL_RANK", "0"))
    if number < devices:
        return number
    # srun may show each rank its own GPU alone; klong and torchrun never do.
    if devices == 1 and not {"KLONG_LAUNCHER", "LOCAL_WORLD_SIZE"} & environment.keys():
        return 0
    raise ValueError(
        f"rank {environment.get('RANK', number)} is number {number} of its machine, from 0, which has "
        f"{devices} GPUs: start as many ranks on a machine as it has GPUs (parallel.nproc, --nproc_per_node, "
        "--ntasks-per-node)"
    )
