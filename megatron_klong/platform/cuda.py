"""One rank, one GPU. Not yet run on real hardware by this project."""

from __future__ import annotations

import os

import torch

from megatron_klong.platform.base import Platform


def install() -> Platform:
    """Bind this process to the GPU of its local rank (``LOCAL_RANK``, 0 where unset)."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return Platform(name="cuda", device=device, backend="nccl")
