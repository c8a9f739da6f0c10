"""What the rest of the package may know about the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Platform:
    """The device and the collective backend of this process.

    Attributes:
        name: ``"cpu"`` or ``"cuda"``, for reports only.
        device: where this rank's tensors live.
        backend: ``torch.distributed`` backend, ``"gloo"`` or ``"nccl"``.
    """

    name: str
    device: torch.device
    backend: str
