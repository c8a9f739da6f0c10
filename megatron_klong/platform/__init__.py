"""The one place that knows whether this is a CPU or a GPU machine."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

from megatron_klong.platform.base import Platform

__all__ = ["Platform", "activate", "import_megatron", "quiet_imports"]


_NVIDIA = Path("/dev/nvidiactl")
"""Of NVIDIA's driver; in a container only where it was given GPUs."""


def activate() -> Platform:
    """Prepare this process for Megatron-Core on the machine's own device, and say which it is.

    Must run before any Megatron model is built. CUDA where PyTorch can use it, else the CPU.

    Raises:
        ValueError: there are GPUs, but PyTorch cannot use them, or fewer than this machine has ranks.
    """
    import torch

    if torch.cuda.is_available():
        from megatron_klong.platform import cuda

        return cuda.install()
    if _NVIDIA.exists() and os.environ.get("CUDA_VISIBLE_DEVICES") != "":
        raise ValueError(
            f"this machine has NVIDIA GPUs that torch {torch.__version__} cannot use: it is a build for "
            f"CPUs, or wants a newer driver (it is built for CUDA {torch.version.cuda}). With an empty "
            "CUDA_VISIBLE_DEVICES= it computes on the CPU all the same"
        )
    from megatron_klong.platform import cpu

    return cpu.install()


def quiet_imports() -> None:
    """Silence what is said of things we mean: Megatron where Transformer Engine and Apex are absent,
    and torch where one process alone reads or writes a distributed checkpoint."""
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed")
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    warnings.filterwarnings("ignore", message="full scope is deprecated")


def import_megatron() -> None:
    """Import Megatron-Core on a rank: quietly, and without W&B.

    Megatron imports W&B for logs of its own inference, which is a third of a rank's start and which
    nothing here uses. A rank that logs to W&B imports it afterwards, as if nothing had been.
    """
    quiet_imports()
    hidden = "wandb" not in sys.modules
    if hidden:
        sys.modules["wandb"] = None  # type: ignore[assignment]  # Python's own word for "not installed"
    try:
        import megatron.core  # noqa: F401
    finally:
        if hidden:
            del sys.modules["wandb"]
