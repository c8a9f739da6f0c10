"""Log-probs of given tokens under the model that is being trained."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor

from megatron_klong.data.rows import PackedRow, fill_row
from megatron_klong.data.windows import TrainingSample
from megatron_klong.training.step import evaluate
from megatron_klong.training.trainer import Trainer


def score_tokens(trainer: Trainer, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
    """Log-prob of every token but the first of each prompt, at temperature 1; collective.

    Every data-parallel rank computes all prompts, one row each.

    Args:
        prompts: token ids; none longer than a row of the trainer.

    Returns:
        On every rank: for each prompt, as many numbers as it has tokens but one.

    Raises:
        ValueError: a prompt does not fit in a row.
    """
    longest = max(len(prompt) for prompt in prompts)
    if longest > trainer.row_tokens:
        raise ValueError(f"a prompt of {longest} tokens does not fit in a row of {trainer.row_tokens}")
    seen: list[list[float]] = []

    def keep(log_probs_R: Tensor, _row: PackedRow, _mask_R: Tensor) -> Tensor:
        seen.append(log_probs_R.detach().float().tolist())
        return log_probs_R.sum() * 0

    rows = [fill_row([_sample(prompt)], trainer.row_tokens) for prompt in prompts]
    rows += [fill_row([], trainer.row_tokens)] * (-len(rows) % trainer.row_multiple)
    evaluate(trainer, rows, keep)
    shared = [seen]
    stages = parallel_state.get_pipeline_model_parallel_group()
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    torch.distributed.broadcast_object_list(shared, last, stages)
    return [tuple(numbers[: len(prompt) - 1]) for numbers, prompt in zip(shared[0], prompts)]


def _sample(prompt: Sequence[int]) -> TrainingSample:
    ids = np.asarray(prompt, dtype=np.int64)
    return TrainingSample(ids, np.ones(len(ids), dtype=bool), trajectory=0, window=0)
