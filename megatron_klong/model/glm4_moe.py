"""GLM-4.5-MoE on Megatron-Core."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klong.config import ParallelConfig
from megatron_klong.model.hf_config import Glm4MoeConfig
from megatron_klong.model.specs import torch_block_spec


def transformer_config(hf: Glm4MoeConfig, parallel: ParallelConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's description of the model (design, section 4).

    The loss is summed over tokens and divided by the global count (``calculate_per_token_loss``).
    There is no auxiliary loss, and the expert bias does not move (update rate 0), which is the
    rule for SFT.
    """
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        init_method_std=hf.initializer_range,
        # The values are overwritten, but only initialising marks weights as tensor parallel, and
        # without the mark the gradient norm counts them on the first tensor-parallel rank alone.
        perform_initialization=True,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        add_qkv_bias=hf.attention_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.tensor > 1,
        calculate_per_token_loss=True,
        num_moe_experts=hf.n_routed_experts,
        moe_layer_freq=[int(hf.is_moe_layer(layer)) for layer in range(hf.num_hidden_layers)],
        moe_ffn_hidden_size=hf.moe_intermediate_size,
        moe_shared_expert_intermediate_size=hf.n_shared_experts * hf.moe_intermediate_size or None,
        moe_router_topk=hf.num_experts_per_tok,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.0,
        moe_router_topk_scaling_factor=hf.routed_scaling_factor,
        moe_router_dtype="fp32",
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="alltoall",
    )


def build_model(hf: Glm4MoeConfig, parallel: ParallelConfig, dtype: torch.dtype, row_tokens: int) -> GPTModel:
    """This rank's part of the model, its weights not yet set (see ``weights.load_weights``)."""
    config = transformer_config(hf, parallel, dtype)
    return GPTModel(
        config=config,
        transformer_layer_spec=torch_block_spec(config),
        vocab_size=hf.vocab_size,
        max_sequence_length=row_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_percent=hf.partial_rotary_factor,
        rotary_base=hf.rope_theta,
    )
