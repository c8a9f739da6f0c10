"""A decoder on Megatron-Core, from its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_klong.config import ModelConfig, ParallelConfig
from megatron_klong.model.attention import RotaryTable
from megatron_klong.model.decoder import DecoderConfig, MoeConfig
from megatron_klong.model.linear_cross_entropy import linear_cross_entropy
from megatron_klong.model.row import RowLayout, Target
from megatron_klong.model.specs import has_transformer_engine, layer_specs, prediction_spec
from megatron_klong.model.stages import stage_layers

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class RowModel(GPTModel):
    """Megatron's GPT over packed rows: their layout says positions and targets, nothing is derived.

    Args (beside Megatron's):
        rotary: tables of position embedding, made once for a row and used by every layer.
        loss_chunk_tokens: tokens whose logits exist at a time.
        trains_prediction: whether multi-token prediction layers are trained; if not, they are held and saved
            as they are, and never computed.
    """

    def __init__(
        self, *, rotary: RotaryTable, loss_chunk_tokens: int, trains_prediction: bool, **options: object
    ) -> None:
        super().__init__(position_embedding_type="none", **options)
        self.rotary = rotary
        self.loss_chunk_tokens = loss_chunk_tokens
        self.temperature = 1.0
        """Of sampling, that logits are divided by."""
        self.trains_prediction = trains_prediction
        self.computes_prediction = trains_prediction and self.mtp_process
        """On this pipeline stage."""
        self.prediction_loss_sum: Tensor | float = 0.0
        """Of this rank's tokens since it was last set to 0, without its weight."""
        if self.mtp_process and not trains_prediction:
            self.mtp.requires_grad_(False)

    def forward(
        self,
        tokens_1T: Tensor,
        row: RowLayout,
        target: Target | None = None,
        predicted: Sequence[Target] = (),
    ) -> Tensor:
        """Token losses, fp32 ``[1, T]``, 0 where nothing is trained; on all but the last pipeline stage the
        hidden states.

        Args:
            tokens_1T: int64, of this context-parallel rank.
            target: the next tokens. Without it the logits are returned, of this tensor-parallel rank's part
                of the vocabulary, ``[1, T, V / TP]``.
            predicted: the targets of multi-token prediction, by depth. Their losses are added to the
                gradient, not to the result.
        """
        assert row.positions_T is not None
        row = replace(
            row, rotary_T1D=self.rotary(row.positions_T), padding_1T=self._own_share(row.padding_1T)
        )  # fmt: skip
        embedded = self.embedding(input_ids=tokens_1T, position_ids=None) if self.pre_process else None
        hidden: Tensor = self.decoder(
            hidden_states=embedded, attention_mask=None, packed_seq_params=row, padding_mask=row.padding_1T
        )
        if not self.post_process:
            return hidden
        if self.computes_prediction and self.training and torch.is_grad_enabled():
            hidden = self._with_prediction(hidden, row, predicted)
        if target is not None:
            return self._token_losses(hidden, target)
        logits, _ = self.output_layer(self._cooled(hidden), weight=self._head())
        return logits.transpose(0, 1)

    def _cooled(self, hidden: Tensor) -> Tensor:
        return hidden if self.temperature == 1.0 else hidden / self.temperature

    def _head(self) -> Tensor:
        """The output layer's weight, ``[V / TP, H]``."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _token_losses(self, hidden: Tensor, target: Target) -> Tensor:
        """Of hidden states ``[T, 1, H]`` (with sequence parallelism, this rank's share of them)."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        return linear_cross_entropy(
            self._cooled(hidden).squeeze(1), self._head(), target.labels_1T.squeeze(0),
            target.loss_mask_1T.squeeze(0) > 0, self.loss_chunk_tokens, group,
        ).unsqueeze(0)  # fmt: skip

    def _own_share(self, padding_1T: Tensor | None) -> Tensor | None:
        """With sequence parallelism, of the tokens that this rank's routers see."""
        if padding_1T is None or not self.config.sequence_parallel:
            return padding_1T
        group = self.pg_collection.tp
        return padding_1T.chunk(group.size(), dim=1)[group.rank()]

    def _with_prediction(self, hidden: Tensor, row: RowLayout, predicted: Sequence[Target]) -> Tensor:
        """The hidden states as they are, with the gradient of the prediction losses tied to them."""
        scale = self.config.mtp_loss_scaling_factor / len(self.mtp.layers)
        states = hidden
        for layer, target in zip(self.mtp.layers, predicted, strict=True):
            states, _, _ = layer(
                input_ids=None, position_ids=None, hidden_states=states, attention_mask=None,
                packed_seq_params=row, embedding=self.embedding,
            )  # fmt: skip
            losses = self._token_losses(states, target)
            self.prediction_loss_sum += losses.detach().sum() / len(self.mtp.layers)
            hidden = MTPLossAutoScaler.apply(hidden, losses * scale)
        return hidden


def build_model(
    hf: DecoderConfig, parallel: ParallelConfig, settings: ModelConfig, row_tokens: int
) -> RowModel:
    """This rank's part of the model, its weights not yet set (see ``weights.load_weights``)."""
    config = transformer_config(hf, parallel, settings)
    model = RowModel(
        config=config,
        transformer_layer_spec=layer_specs(config),
        mtp_block_spec=prediction_spec(config) if hf.prediction_layers else None,
        vocab_size=hf.vocab_size,
        max_sequence_length=row_tokens,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=hf.tie_word_embeddings,
        rotary=RotaryTable(hf.rotary_dim, hf.rope_theta),
        loss_chunk_tokens=settings.loss_chunk_tokens,
        trains_prediction=settings.prediction == "train",
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
    """What each pipeline stage has, in Megatron's words; prediction layers are on the last."""
    if parallel.pipeline == 1:
        return {}
    stages = [["decoder"] * layers for layers in stage_layers(hf.num_hidden_layers, parallel.pipeline)]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * hf.prediction_layers + ["loss"]
    return {"pipeline_model_parallel_layout": stages}


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
