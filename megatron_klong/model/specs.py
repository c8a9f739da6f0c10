"""Layer specs: of Transformer Engine's modules where it is installed, of torch's otherwise.

Both name their weights in checkpoints alike, so a checkpoint of one is read by the other. Transformer
Engine's have not yet run on real hardware by this project.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import checkpoint
from megatron.core.transformer.multi_token_prediction import (
    MultiTokenPredictionBlockSubmodules,
    MultiTokenPredictionLayer,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import make_viewless_tensor
from torch import Tensor
from torch.nn import Module

from megatron_klong.model.attention import PackedAttention
from megatron_klong.model.experts import GroupedExperts
from megatron_klong.model.norm import RMSNorm
from megatron_klong.model.router import Router
from megatron_klong.model.row import RowLayout

__all__ = ["has_transformer_engine", "layer_specs", "prediction_spec"]


def has_transformer_engine() -> bool:
    """Whether its layers are used here."""
    return importlib.util.find_spec("transformer_engine") is not None


def layer_specs(config: TransformerConfig, chunk: int | None) -> TransformerBlockSubmodules:
    """The decoder layers of this pipeline rank.

    Args:
        chunk: which of its stages, where it has several.
    """
    pattern = config.moe_layer_freq
    assert isinstance(pattern, list) and len(pattern) == config.num_layers
    layers = [_layer_spec(config, bool(is_moe)) for is_moe in pattern]
    offset = get_transformer_layer_offset(config, chunk)
    own = layers[offset : offset + get_num_layers_to_build(config, chunk)]
    if has_transformer_engine():
        from megatron.core.extensions.transformer_engine import TENorm

        return TransformerBlockSubmodules(layer_specs=own, layer_norm=TENorm)
    return TransformerBlockSubmodules(layer_specs=own, layer_norm=RMSNorm)


def prediction_spec(
    config: TransformerConfig, chunk: int | None
) -> MultiTokenPredictionBlockSubmodules | None:
    """The multi-token prediction layers, on the last stage; they are like the last decoder layer.

    Args:
        chunk: as of :func:`layer_specs`.
    """
    assert isinstance(config.moe_layer_freq, list)
    layer = _layer_spec(config, bool(config.moe_layer_freq[-1]))
    block = get_gpt_mtp_block_spec(config, layer, has_transformer_engine(), vp_stage=chunk)
    for spec in block.layer_specs if block is not None else ():
        spec.module = PredictionLayer
        if not has_transformer_engine():
            spec.submodules.enorm = spec.submodules.hnorm = spec.submodules.layer_norm = RMSNorm
    return block


def _layer_spec(config: TransformerConfig, is_moe: bool) -> ModuleSpec:
    """Megatron's spec with our attention and router and, without Transformer Engine, norms and experts."""
    experts = config.num_moe_experts if is_moe else None
    if has_transformer_engine():
        spec = get_gpt_layer_with_transformer_engine_spec(
            num_experts=experts, moe_grouped_gemm=True, qk_layernorm=config.qk_layernorm
        )
    else:
        spec = get_gpt_layer_local_spec(
            num_experts=experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm"
        )
        _use_ours(spec, config.qk_layernorm, is_moe)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    if is_moe:
        spec.submodules.mlp.submodules.router = Router
    return spec


def _use_ours(spec: ModuleSpec, qk_norm: bool, is_moe: bool) -> None:
    """Norms and experts of torch alone."""
    layer = spec.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RMSNorm
    if qk_norm:
        attention = layer.self_attention.submodules
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    # Transformer Engine fuses norms into the linear layer behind them, but not into experts.
    layer.sharded_state_dict_keys_map = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
    if is_moe:
        layer.mlp.submodules.experts = ModuleSpec(module=GroupedExperts)
    else:
        layer.sharded_state_dict_keys_map |= {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


class PredictionLayer(MultiTokenPredictionLayer):
    """Megatron's layer, which is told the next tokens.

    Megatron rolls them out of the row itself, by rules that a row cut for context parallelism and, later, a
    shared prefix do not follow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        # Megatron tells its own decoder layers which tokens are padding, and not this one.
        self.transformer_layer.register_forward_pre_hook(_with_padding, with_kwargs=True)

    def _get_embeddings(
        self,
        input_ids: Tensor | None,
        position_ids: Tensor | None,
        embedding: Module,
        hidden_states: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        assert isinstance(packed_seq_params, RowLayout) and packed_seq_params.next_ids_D1T is not None
        next_ids = packed_seq_params.next_ids_D1T[self.layer_number - 1]
        embedded = embedding(input_ids=next_ids, position_ids=None)
        hidden_states = make_viewless_tensor(inp=hidden_states, requires_grad=True, keep_graph=True)
        return next_ids, position_ids, embedded, hidden_states

    def _checkpointed_forward(
        self,
        forward_func: Callable[..., Tensor],
        *,
        hidden_states: Tensor,
        decoder_input: Tensor,
        **rest: Any,
    ) -> Tensor:
        """Megatron's own hands everything to autograd, which keeps tensors only, and a row is none."""

        def forward(hidden_states: Tensor, decoder_input: Tensor) -> Tensor:
            return forward_func(hidden_states=hidden_states, decoder_input=decoder_input, **rest)

        spread = self.config.distribute_saved_activations
        recomputed: Tensor = checkpoint(forward, spread, hidden_states, decoder_input)
        return recomputed


def _with_padding(
    _layer: Module, arguments: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, options | {"padding_mask": options["packed_seq_params"].padding_1T}
