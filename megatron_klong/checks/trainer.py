"""A trainer over random tokens, for checks that need no data."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
from megatron.core import parallel_state

from megatron_klong.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainerSettings
from megatron_klong.data.rows import PackedRow, fill_row
from megatron_klong.data.windows import TrainingSample
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.step import StepResult, train_step
from megatron_klong.training.trainer import Trainer, build_trainer


class RandomTokens:
    """A model in training on rows of random tokens.

    Args:
        weights: Hugging Face folder, or with ``fresh`` one that has a config only.
        offload: keep Adam's moments in host memory.
        deterministic: compute the same bits each time.
    """

    def __init__(
        self, platform: Platform, weights: Path, parallel: ParallelConfig, precision: Literal["fp32", "bf16"],
        row_tokens: int, *, fresh: bool = False, offload: bool = False, deterministic: bool = False,
    ) -> None:  # fmt: skip
        self.hf: DecoderConfig = load_hf_config(weights)
        self.row_tokens = row_tokens
        model = {
            "hf_config": weights,
            "weights": None if fresh else weights,
            "precision": precision,
            "deterministic": deterministic,
        }
        settings = TrainerSettings(
            model=ModelConfig.model_validate(model), parallel=parallel, row_tokens=row_tokens,
            steps=1_000_000, seed=1234,
            optimizer=OptimizerConfig(lr=1e-3, schedule="constant", offload=offload),
        )  # fmt: skip
        self.trainer: Trainer = build_trainer(settings, self.hf, platform)
        self._steps = 0

    def step(self) -> StepResult:
        """One optimizer step on one row for each data-parallel rank, or as few as its stages take."""
        self._steps += 1
        return train_step(self.trainer, [self._row()] * self.trainer.row_multiple, sft_objective)

    def restart(self, step: int) -> None:
        """Go on with the rows behind those of ``step``."""
        self._steps = step

    def _row(self) -> PackedRow:
        seed = (self._steps, parallel_state.get_data_parallel_rank())
        ids = np.random.default_rng(seed).integers(0, self.hf.vocab_size, self.row_tokens)
        return fill_row([TrainingSample(ids, np.ones(len(ids), dtype=bool), 0, 0)], self.row_tokens)
