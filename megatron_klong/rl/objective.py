"""The objective of reinforcement learning on packed rows (design, RL objective)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_klong.config import ObjectiveConfig
from megatron_klong.data.rows import PackedRow


@dataclass(frozen=True)
class ExperienceRow(PackedRow):
    """A packed row with what the objective needs of every label; float32, 0 where nothing is trained.

    Attributes:
        weights_R: what a token counts in the row's sum.
        advantages_R: of its rollout.
        engine_R: log-prob under the distribution that the engine sampled from.
        old_R: log-prob under the trainer's weights at the start of the iteration's updates.
        reference_R: log-prob under the reference; unused at beta 0.
    """

    weights_R: np.ndarray
    advantages_R: np.ndarray
    engine_R: np.ndarray
    old_R: np.ndarray
    reference_R: np.ndarray


@dataclass(frozen=True)
class TokenTerms:
    """The objective of single tokens, and what to watch of it; all of one shape.

    Attributes:
        loss: to be minimised.
        ratio: r = p_now / p_old.
        clipped: whether the clipped branch was taken, so that the token has no gradient from it.
        importance: w = min(p_old / p_engine, C).
    """

    loss: Tensor
    ratio: Tensor
    clipped: Tensor
    importance: Tensor


def token_terms(
    now: Tensor, old: Tensor, engine: Tensor, reference: Tensor, advantages: Tensor, config: ObjectiveConfig
) -> TokenTerms:
    """-w min(r A, clip(r, 1 - e_low, 1 + e_high) A) + beta k3, token by token.

    With r = p_now / p_old, w = min(p_old / p_engine, C), and Schulman's estimator
    k3 = p_ref / p_now - log(p_ref / p_now) - 1.

    Args:
        now: log-probs under the weights that are trained; the only one with a gradient.
        old, engine, reference: log-probs.
        advantages: of each token's rollout.
    """
    ratio = torch.exp(now - old)
    clipped_ratio = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    importance = torch.exp(old - engine).clamp(max=config.importance_cap)
    free, bound = ratio * advantages, clipped_ratio * advantages
    loss = -importance * torch.minimum(free, bound)
    if config.kl:
        apart = reference - now
        loss = loss + config.kl * (torch.exp(apart) - apart - 1)
    return TokenTerms(loss, ratio, bound < free, importance)


class RlObjective:
    """The objective of a row, and sums over all rows of what to watch.

    Attributes:
        sums: float64: trained tokens, clipped tokens, r, w, |log p_old - log p_engine|, and the k3
            estimate of the divergence of the engine from the trainer.
    """

    NAMES = ("tokens", "clipped", "ratio", "importance", "engine_difference", "engine_divergence")

    def __init__(self, config: ObjectiveConfig, device: torch.device) -> None:
        self._config = config
        self._device = device
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)

    def __call__(self, now_R: Tensor, row: ExperienceRow, mask_R: Tensor) -> Tensor:
        arrays = (row.old_R, row.engine_R, row.reference_R, row.advantages_R, row.weights_R)
        old, engine, reference, advantages, weights = (torch.from_numpy(a).to(self._device) for a in arrays)
        trained = mask_R > 0
        # Places that are not trained hold zeros, whose terms could overflow: they are taken out before.
        terms = token_terms(
            now_R[trained],
            old[trained],
            engine[trained],
            reference[trained],
            advantages[trained],
            self._config,
        )
        apart = (old - engine)[trained]
        watched = (
            torch.ones_like(apart), terms.clipped, terms.ratio.detach(), terms.importance, apart.abs(),
            torch.exp(apart) - apart - 1,
        )  # fmt: skip
        self.sums += torch.stack([each.double().sum() for each in watched])
        return (weights[trained] * terms.loss).sum()
