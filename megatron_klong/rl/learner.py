"""What the trainer does with one batch; the same on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_klong.config import RlConfig
from megatron_klong.data.rows import PackedRow
from megatron_klong.rl.batches import Batch
from megatron_klong.rl.exchange import UpdateMetrics
from megatron_klong.rl.objective import ExperienceRow, RlObjective
from megatron_klong.rl.rows import experience_rows
from megatron_klong.training.step import evaluate, train_step
from megatron_klong.training.temperature import at_temperature
from megatron_klong.training.trainer import Trainer


class Learner:
    """Takes the optimizer steps of each batch.

    Args:
        trainer: with the weights that the run starts from, which become the reference where
            ``objective.kl`` is above 0; a resumed run loads its own weights after.
    """

    def __init__(self, trainer: Trainer, config: RlConfig) -> None:
        self._trainer = trainer
        self._config = config
        self._reference = _host_copy(trainer) if config.objective.kl else None

    def learn(self, batch: Batch) -> tuple[UpdateMetrics, ...]:
        """One pass over a batch: old (and reference) log-probs, then ``objective.updates`` steps."""
        config, ways = self._config, parallel_state.get_data_parallel_world_size()
        updates = experience_rows(
            batch, self._trainer.row_tokens, config.objective, ways * self._trainer.row_multiple,
            config.run.seed + batch.header.iteration,
        )  # fmt: skip
        rank = parallel_state.get_data_parallel_rank()
        with at_temperature(self._trainer, config.rollout.temperature):
            mine = self._with_log_probs([rows[rank::ways] for rows in updates])
            return tuple(self._update(rows) for rows in mine)

    def _with_log_probs(self, updates: list[list[ExperienceRow]]) -> list[list[ExperienceRow]]:
        rows = [row for part in updates for row in part]
        old = self._log_probs(rows)
        rows = [replace(row, old_R=given) for row, given in zip(rows, old)]
        if self._reference is not None:
            present = _host_copy(self._trainer)
            _put(self._trainer, self._reference)
            reference = self._log_probs(rows)
            _put(self._trainer, present)
            rows = [replace(row, reference_R=given) for row, given in zip(rows, reference)]
        each = len(rows) // len(updates)
        return [rows[start : start + each] for start in range(0, len(rows), each)]

    def _log_probs(self, rows: Sequence[ExperienceRow]) -> list[np.ndarray]:
        """Of all labels of the rows, by the present weights; zeros on all but the last pipeline stage."""
        seen: list[np.ndarray] = []

        def keep(log_probs_R: Tensor, _row: PackedRow, mask_R: Tensor) -> Tensor:
            seen.append((log_probs_R.detach().float() * mask_R).cpu().numpy())
            return log_probs_R.sum() * 0

        evaluate(self._trainer, rows, keep)
        return seen or [row.old_R for row in rows]

    def _update(self, rows: list[ExperienceRow]) -> UpdateMetrics:
        objective = RlObjective(self._config.objective, self._trainer.device)
        result = train_step(self._trainer, rows, objective)
        torch.distributed.all_reduce(objective.sums, group=parallel_state.get_data_parallel_group())
        stages = parallel_state.get_pipeline_model_parallel_group()
        torch.distributed.broadcast(
            objective.sums, parallel_state.get_pipeline_model_parallel_last_rank(), stages
        )
        tokens, *sums = objective.sums.tolist()
        means = dict(zip(RlObjective.NAMES[1:], (each / max(tokens, 1.0) for each in sums)))
        return UpdateMetrics(
            loss=result.loss, grad_norm=result.grad_norm, learning_rate=result.learning_rate,
            trained_tokens=result.trained_tokens, tokens=result.tokens,
            balancing_loss=result.balancing_loss, **means,
        )  # fmt: skip


def _host_copy(trainer: Trainer) -> dict[str, Any]:
    """The weights of this rank, in host memory (pinned where there is a GPU)."""
    on_gpu = trainer.device.type == "cuda"
    copies = {}
    for name, tensor in trainer.model.state_dict().items():
        if isinstance(tensor, Tensor):
            copies[name] = torch.empty_like(tensor, device="cpu", pin_memory=on_gpu).copy_(tensor)
    return copies


@torch.no_grad()
def _put(trainer: Trainer, weights: dict[str, Any]) -> None:
    present = trainer.model.state_dict()
    for name, tensor in weights.items():
        present[name].copy_(tensor)
