"""A tiny GLM-4.5-shaped model with random weights, for checks that bring none of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch

from megatron_klong.convert.safetensors_file import Entry, SafetensorsWriter
from megatron_klong.model.hf_config import parse_hf_config
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.model.weights import random_weights

SHAPE = {
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "attention_bias": True,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 0,
    "max_position_embeddings": 4096,
    "rope_theta": 1e6,
    "partial_rotary_factor": 0.5,
    "initializer_range": 0.08,  # large, so that log-probs differ from those of any other weights
}


def write_tiny_model(folder: Path, precision: Literal["fp32", "bf16"], **changes: int | float | bool) -> Path:
    """Write config and weights of the tiny model; ``changes`` are fields of its config."""
    raw = SHAPE | changes
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(
        json.dumps(raw | {"dtype": str(dtype).removeprefix("torch.")}, indent=1)
    )
    config = parse_hf_config(raw, "the tiny model")
    source = random_weights(config, seed=0)
    parts = [part for rule in weight_rules(config).values() for part in rule.hf]
    entries = [Entry(part.name, part.shape, _kind(part.name, dtype)) for part in parts]
    with SafetensorsWriter(folder / "model.safetensors", entries) as writer:
        for part, entry in zip(parts, entries):
            writer.write(part.name, source(part).to(entry.dtype))
    return folder


def _kind(name: str, dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype
