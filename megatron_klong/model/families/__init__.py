"""The model families, by the ``model_type`` of their Hugging Face config."""

from __future__ import annotations

from megatron_klong.model.families.base import Family
from megatron_klong.model.families.glm4_moe import GLM4_MOE
from megatron_klong.model.families.qwen3 import QWEN3, QWEN3_MOE

__all__ = ["FAMILIES", "Family"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (GLM4_MOE, QWEN3_MOE, QWEN3)}
