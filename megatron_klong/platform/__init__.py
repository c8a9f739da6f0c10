"""The one place that knows whether this is a CPU or a GPU machine."""

from __future__ import annotations

import warnings

from megatron_klong.platform.base import Platform

__all__ = ["Platform", "activate", "quiet_imports"]


def activate() -> Platform:
    """Prepare this process for Megatron-Core on the machine's own device, and say which it is.

    Must run before any Megatron model is built. CUDA where PyTorch can use it, else the CPU.
    """
    import torch

    if torch.cuda.is_available():
        from megatron_klong.platform import cuda

        return cuda.install()
    from megatron_klong.platform import cpu

    return cpu.install()


def quiet_imports() -> None:
    """Silence what is said of things we mean: Megatron where Transformer Engine and Apex are absent,
    and torch where one process alone reads or writes a distributed checkpoint."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="full scope is deprecated")
