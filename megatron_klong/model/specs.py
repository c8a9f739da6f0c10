"""Layer specs built from torch alone: for the CPU, and for a GPU without Transformer Engine."""

from __future__ import annotations

from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_klong.model.attention import PackedAttention
from megatron_klong.model.norm import RMSNorm

__all__ = ["torch_block_spec"]


def torch_block_spec(config: TransformerConfig) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline rank, with our norm and our core attention.

    Megatron's local layer spec is taken as it is and three of its submodules are exchanged; its
    parallel linear layers and expert modules stay.
    """
    pattern = config.moe_layer_freq
    assert isinstance(pattern, list) and len(pattern) == config.num_layers
    layers = [_layer_spec(config.num_moe_experts if is_moe else None) for is_moe in pattern]
    offset = get_transformer_layer_offset(config)
    return TransformerBlockSubmodules(
        layer_specs=layers[offset : offset + get_num_layers_to_build(config)], layer_norm=RMSNorm
    )


def _layer_spec(num_experts: int | None) -> ModuleSpec:
    assert not LocalSpecProvider().fuse_layernorm_and_linear()
    spec = get_gpt_layer_local_spec(num_experts=num_experts, normalization="RMSNorm")
    spec.submodules.input_layernorm = RMSNorm
    spec.submodules.pre_mlp_layernorm = RMSNorm
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    return spec
