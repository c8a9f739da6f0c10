"""Objectives of a step."""

from __future__ import annotations

from torch import Tensor

from megatron_klong.data.rows import PackedRow


def sft_objective(log_probs_R: Tensor, row: PackedRow, loss_mask_R: Tensor) -> Tensor:
    """Negative log-likelihood summed over the trained tokens of a row (design, SFT loss).

    The step divides the sum over the global batch by its number of trained tokens, so the loss is
    the same to rounding at any layout, micro-batching and packing.
    """
    return -(log_probs_R * loss_mask_R).sum()
