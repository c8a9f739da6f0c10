"""What devices can do at most, as their makers state it."""

from __future__ import annotations

import torch

_BF16_TFLOPS = (("B200", 2250.0), ("H200", 989.0), ("H100", 989.0), ("A100", 312.0), ("L40S", 362.0))
"""Dense, of the SXM forms; NVIDIA's data sheets."""


def peak_tflops(device: torch.device, precision: str) -> float | None:
    """TFLOP/s of a device, or None where it is not known."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BF16_TFLOPS if part in name), None)
