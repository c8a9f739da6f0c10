"""A tiny GLM-4.5-MoE in transformers, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Glm4MoeConfig as ReferenceConfig
from transformers import Glm4MoeForCausalLM

from megatron_klong.config import ParallelConfig, SftConfig, TrainerSettings
from megatron_klong.data.rows import PackedRow, fill_row
from megatron_klong.data.windows import TrainingSample
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import parse_hf_config

ROW_TOKENS = 64

SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "attention_bias": True,
    "moe_intermediate_size": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.5,
    "num_mtp_layers": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
}


def reference_model() -> Glm4MoeForCausalLM:
    """Transformers' implementation in fp32; no bias and no norm weight at its trivial value."""
    torch.manual_seed(5)
    config = ReferenceConfig(**SHAPE)
    config._attn_implementation = "eager"
    model = Glm4MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name:
                tensor.normal_(0, 0.1)
            elif "norm" in name:
                tensor.normal_(1, 0.1)
            elif "inv_freq" not in name:
                tensor.normal_(0, 0.05)
    return model


def hf_config() -> DecoderConfig:
    return parse_hf_config({**ReferenceConfig(**SHAPE).to_diff_dict(), "model_type": "glm4_moe"}, "tests")


def sft_config(parallel: ParallelConfig, folder: Path, rows: int = 4) -> SftConfig:
    """A run of 10 steps at a constant rate; data and model come from the test."""
    return SftConfig.model_validate(
        {
            "run": {"dir": folder / "run"},
            "model": {"hf_config": folder, "weights": folder, "precision": "fp32"},
            "data": {
                "sources": {"test": {"store": folder}},
                "phases": {"train": {"steps": 10}},
                "window": {
                    "max_tokens": ROW_TOKENS,
                    "overlap_tokens": 8,
                    "reserve_generation": 8,
                    "reserve_observation": 8,
                },
            },
            "parallel": parallel.model_dump(),
            "optimizer": {"lr": 1e-3, "schedule": "constant"},
            "training": {"global_batch_rows": rows},
        }
    )


def settings(parallel: ParallelConfig, folder: Path) -> TrainerSettings:
    """What the trainer of :func:`sft_config` is built from."""
    return trainer_settings(sft_config(parallel, folder))


def trainer_settings(config: SftConfig) -> TrainerSettings:
    """What the trainer of a config with a fixed number of steps is built from."""
    assert config.data.fixed_steps is not None
    return config.trainer_settings(config.data.fixed_steps)


def random_samples(seed: int, *lengths: int) -> list[TrainingSample]:
    """Samples of random tokens, about half of them trained."""
    random = np.random.default_rng(seed)
    return [
        TrainingSample(
            random.integers(0, SHAPE["vocab_size"], length),  # type: ignore[call-overload]
            random.random(length) < 0.5,
            trajectory=number,
            window=0,
        )
        for number, length in enumerate(lengths)
    ]


def batch() -> list[list[TrainingSample]]:
    """Four rows: uneven counts of samples and of trained tokens, one full to the last token."""
    return [
        random_samples(1, 40, 20),
        random_samples(2, 64),
        random_samples(3, 10, 13, 7, 9),
        random_samples(4, 3),
    ]


def packed(batch_rows: Sequence[Sequence[TrainingSample]]) -> list[PackedRow]:
    return [fill_row(list(samples), ROW_TOKENS) for samples in batch_rows]


def reference_loss(model: Glm4MoeForCausalLM, batch_rows: Sequence[Sequence[TrainingSample]]) -> Tensor:
    """Mean negative log-likelihood over all trained tokens, each sample on its own, unpacked."""
    total, count = torch.zeros(()), 0
    for samples in batch_rows:
        for sample in samples:
            tokens = torch.from_numpy(sample.tokens_T)
            logits = model(tokens.unsqueeze(0)).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
            mask = torch.from_numpy(sample.loss_mask_T[1:])
            total = total + losses[mask].sum()
            count += int(mask.sum())
    return total / count
