"""A trainer over random tokens, for checks that need no data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from megatron.core import parallel_state

from megatron_klong.config import ParallelConfig, SftConfig
from megatron_klong.data.rows import PackedRow, fill_row
from megatron_klong.data.windows import TrainingSample
from megatron_klong.model.hf_config import Glm4MoeConfig, load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import StepResult, train_step
from megatron_klong.training.trainer import Trainer, build_trainer


class RandomTokens:
    """A model in training on rows of random tokens.

    Args:
        weights: Hugging Face folder, or with ``fresh`` one that has a config only.
    """

    def __init__(
        self, platform: Platform, weights: Path, parallel: ParallelConfig, precision: Literal["fp32", "bf16"],
        row_tokens: int, *, fresh: bool = False,
    ) -> None:  # fmt: skip
        self.hf: Glm4MoeConfig = load_hf_config(weights)
        self.row_tokens = row_tokens
        window = {
            "max_tokens": row_tokens, "overlap_tokens": 1, "reserve_generation": 1, "reserve_observation": 1,
        }  # fmt: skip
        config = SftConfig.model_validate(
            {
                "run": {"dir": weights},
                "model": {
                    "hf_config": weights, "weights": None if fresh else weights, "precision": precision,
                },
                "data": {"store": weights, "window": window},
                "parallel": parallel.model_dump(),
                "optimizer": {"lr": 1e-3, "schedule": "constant"},
                "training": {"steps": 1_000_000, "global_batch_rows": parallel.data(parallel.world_size)},
            }
        )  # fmt: skip
        self.trainer: Trainer = build_trainer(config, self.hf, platform)
        self._steps = 0

    def step(self) -> StepResult:
        """One optimizer step on one row for each data-parallel rank."""
        self._steps += 1
        return train_step(self.trainer, [self._row()], sft_objective)

    def _row(self) -> PackedRow:
        seed = (self._steps, parallel_state.get_data_parallel_rank())
        ids = np.random.default_rng(seed).integers(0, self.hf.vocab_size, self.row_tokens)
        return fill_row([TrainingSample(ids, np.ones(len(ids), dtype=bool), 0, 0)], self.row_tokens)
