"""A tiny model with random weights, for checks that bring none of their own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_klong.config import preset_file
from megatron_klong.convert.safetensors_file import Entry, SafetensorsWriter
from megatron_klong.model.hf_config import parse_hf_config
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.model.weights import random_weights


def tiny_shape(preset: str = "tiny-glm-4.5", **changes: int | float | bool) -> dict[str, Any]:
    """The Hugging Face config of a tiny model without prediction layers; ``changes`` are fields of it."""
    shape: dict[str, Any] = json.loads(preset_file(preset).read_text())
    if "num_nextn_predict_layers" in shape:
        shape["num_nextn_predict_layers"] = 0
    return shape | changes


def write_tiny_model(
    folder: Path,
    precision: Literal["fp32", "bf16"],
    preset: str = "tiny-glm-4.5",
    **changes: int | float | bool,
) -> Path:
    """Write config and random weights of :func:`tiny_shape`."""
    raw = tiny_shape(preset, **changes)
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
