"""GLM-4.5 and GLM-4.5-Air (design, section 4)."""

from __future__ import annotations

from megatron_klong.model.decoder import DecoderConfig, MoeConfig
from megatron_klong.model.families.base import Family, Values, decoder_values


def _build(values: Values) -> DecoderConfig:
    layers, dense = values["num_hidden_layers"], values["first_k_dense_replace"]
    moe = MoeConfig(
        layers=tuple(layer >= dense for layer in range(layers)),
        experts=values["n_routed_experts"],
        top_k=values["num_experts_per_tok"],
        width=values["moe_intermediate_size"],
        shared_width=values["n_shared_experts"] * values["moe_intermediate_size"],
        scores="sigmoid",
        expert_bias=True,
        normalized=True,
        scaling=values["routed_scaling_factor"],
    )
    return DecoderConfig(
        family="glm4_moe",
        **decoder_values(values),
        partial_rotary_factor=values["partial_rotary_factor"],
        attention_bias=values["attention_bias"],
        qk_norm=values["use_qk_norm"],
        moe=moe,
        prediction_layers=values["num_nextn_predict_layers"],
    )


GLM4_MOE = Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
        "use_qk_norm": False,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 1,
    },
    only={"hidden_act": "silu", "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "rope_scaling": None},
    build=_build,
    renamed={"num_mtp_layers": "num_nextn_predict_layers", "num_local_experts": "n_routed_experts"},
    may_be_zero=frozenset({"n_shared_experts", "first_k_dense_replace", "num_nextn_predict_layers"}),
)
