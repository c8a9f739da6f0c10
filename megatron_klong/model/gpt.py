"""A decoder on Megatron-Core, from its shape."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_klong.config import ModelConfig, ParallelConfig
from megatron_klong.model.attention import RotaryTable
from megatron_klong.model.decoder import DecoderConfig, MoeConfig
from megatron_klong.model.row_model import RankModel, RowModel
from megatron_klong.model.specs import has_transformer_engine, layer_specs, prediction_spec
from megatron_klong.model.stages import stage_layers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(
    hf: DecoderConfig, parallel: ParallelConfig, settings: ModelConfig, row_tokens: int
) -> RankModel:
    """This rank's part of the model, its weights not yet set (see ``weights.load_weights``)."""
    config = transformer_config(hf, parallel, settings)
    chunks = range(parallel.virtual) if parallel.virtual > 1 else (None,)
    return RankModel([_stage(hf, config, settings, row_tokens, chunk) for chunk in chunks])


def _stage(
    hf: DecoderConfig, config: TransformerConfig, settings: ModelConfig, row_tokens: int, chunk: int | None
) -> RowModel:
    """A stage of this rank: ``chunk`` says which, where it has several."""
    model = RowModel(
        config=config,
        transformer_layer_spec=layer_specs(config, chunk),
        mtp_block_spec=prediction_spec(config, chunk) if hf.prediction_layers else None,
        vocab_size=hf.vocab_size,
        max_sequence_length=row_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=chunk),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=chunk),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        rotary=RotaryTable(hf.rotary_dim, hf.rope_theta),
        loss_chunk_tokens=settings.loss_chunk_tokens,
        trains_prediction=settings.prediction == "train",
        vp_stage=chunk,
    )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Megatron takes experts for dense weights where expert parallelism is off, and would not sum
            # their gradients over tensor-parallel ranks, each of which has routed other tokens to them.
            parameter.allreduce = False
    return model


def transformer_config(
    hf: DecoderConfig, parallel: ParallelConfig, settings: ModelConfig
) -> TransformerConfig:
    """Megatron's description of the model (design, section 4).

    The loss is summed over tokens and divided by the global count (``calculate_per_token_loss``).
    """
    dtype = _DTYPES[settings.precision]
    return TransformerConfig(
        num_layers=hf.num_hidden_layers,
        hidden_size=hf.hidden_size,
        ffn_hidden_size=hf.intermediate_size,
        num_attention_heads=hf.num_attention_heads,
        num_query_groups=hf.num_key_value_heads,
        kv_channels=hf.head_dim,
        layernorm_epsilon=hf.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=hf.qk_norm,
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
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=1,
        sequence_parallel=parallel.tensor > 1,
        deterministic_mode=settings.deterministic,
        calculate_per_token_loss=True,
        mtp_num_layers=hf.prediction_layers or None,
        mtp_loss_scaling_factor=settings.prediction_loss_weight,
        moe_layer_freq=[int(hf.is_moe_layer(layer)) for layer in range(hf.num_hidden_layers)],
        **_stage_options(hf, parallel),
        **_recompute_options(settings),
        **(_moe_options(hf.moe, settings) if hf.moe else {}),
    )


def _stage_options(hf: DecoderConfig, parallel: ParallelConfig) -> dict[str, object]:
    """What each stage has, in Megatron's words; prediction layers are on the last."""
    if parallel.pipeline == 1:
        return {}
    stages = [["decoder"] * layers for layers in stage_layers(hf.num_hidden_layers, parallel.stages)]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * hf.prediction_layers + ["loss"]
    # Two ranks that are each other's neighbours on both sides mix up batched messages of interleaved stages.
    own_messages = parallel.virtual > 1
    return {
        "pipeline_model_parallel_layout": stages,
        "overlap_p2p_comm": own_messages,
        "batch_p2p_comm": not own_messages,
    }


def _recompute_options(settings: ModelConfig) -> dict[str, object]:
    if settings.recompute == "none":
        return {}
    if settings.recompute != "full":
        return {"recompute_granularity": "selective", "recompute_modules": list(settings.recompute)}
    layers = settings.recompute_layers
    return {
        "recompute_granularity": "full",
        "recompute_method": "block" if layers else "uniform",
        "recompute_num_layers": layers or 1,
    }


def _moe_options(moe: MoeConfig, settings: ModelConfig) -> dict[str, object]:
    router = settings.router
    return {
        "num_moe_experts": moe.experts,
        "moe_ffn_hidden_size": moe.width,
        "moe_shared_expert_intermediate_size": moe.shared_width or None,
        "moe_grouped_gemm": has_transformer_engine(),
        "moe_router_topk": moe.top_k,
        "moe_router_score_function": moe.scores,
        # Softmax over all experts, of which the chosen ones keep their share; else over the chosen ones.
        "moe_router_pre_softmax": moe.scores == "softmax" and not moe.normalized,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_bias_update_rate": router.bias_update_rate,
        "moe_router_topk_scaling_factor": moe.scaling,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": router.balancing,
        "moe_aux_loss_coeff": router.balancing_coefficient,
        "moe_enable_routing_replay": router.replay,
        "moe_token_dispatcher_type": "alltoall",
    }
