"""One rank, one GPU. Not yet run on real hardware by this project."""

from __future__ import annotations

import os

import torch

from megatron_klong.platform.base import Platform


def install() -> Platform:
    """Bind this process to the GPU of its local rank (``LOCAL_RANK``, 0 where unset)."""
    # Where a launcher shows each rank its own GPU alone, that is number 0 for all of them.
    number = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    device = torch.device("cuda", number)
    torch.cuda.set_device(device)
    return Platform(name="cuda", device=device, backend="nccl")
