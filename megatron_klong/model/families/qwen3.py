"""Qwen3, dense and with experts."""

from __future__ import annotations

from typing import Any

from megatron_klong.model.decoder import DecoderConfig, MoeConfig
from megatron_klong.model.families.base import Family, Values, decoder_values

_WITHOUT_INFLUENCE = frozenset(
    # Sliding windows are off (only); these say where they would be, and how losses are reported.
    {"sliding_window", "max_window_layers", "layer_types", "output_router_logits", "router_aux_loss_coef"}
)

_ONLY: dict[str, Any] = {
    "hidden_act": "silu",
    "use_sliding_window": False,
    "rope_scaling": None,
    "attention_bias": False,  # it would give the output projection one too
    "partial_rotary_factor": 1.0,
}

_COMMON: dict[str, Any] = {
    "vocab_size": 151936,
    "head_dim": 128,
    "num_attention_heads": 32,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "initializer_range": 0.02,
}


def _build(family: str, values: Values, moe: MoeConfig | None) -> DecoderConfig:
    return DecoderConfig(
        family=family,
        **decoder_values(values),
        partial_rotary_factor=1.0,
        attention_bias=False,
        qk_norm=True,
        moe=moe,
        prediction_layers=0,
    )


def _build_dense(values: Values) -> DecoderConfig:
    return _build("qwen3", values, None)


def _build_moe(values: Values) -> DecoderConfig:
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"]
    moe = MoeConfig(
        layers=tuple(
            layer not in dense and (layer + 1) % step == 0 for layer in range(values["num_hidden_layers"])
        ),
        experts=values["num_experts"],
        top_k=values["num_experts_per_tok"],
        width=values["moe_intermediate_size"],
        shared_width=0,
        scores="softmax",
        expert_bias=False,
        normalized=values["norm_topk_prob"],
        scaling=1.0,
    )
    return _build("qwen3_moe", values, moe)


QWEN3 = Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    defaults={
        **_COMMON,
        "hidden_size": 4096,
        "intermediate_size": 22016,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
    },
    only=_ONLY,
    build=_build_dense,
    ignored=_WITHOUT_INFLUENCE,
    head_dim_default=128,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    defaults={
        **_COMMON,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    only=_ONLY,
    build=_build_moe,
    ignored=_WITHOUT_INFLUENCE,
    renamed={"num_local_experts": "num_experts"},
)
