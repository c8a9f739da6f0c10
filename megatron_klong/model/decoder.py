"""The shape of a decoder, whichever family it is of. Imports no torch: it is looked at before a start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """The layers with routed experts.

    Attributes:
        layers: for each decoder layer, whether it has experts; the others are dense.
        experts: routed experts of a layer.
        top_k: of them, those that a token is sent to.
        width: inner size of one.
        shared_width: inner size of all shared experts together; 0 without.
        scores: what makes weights of the router's logits.
        expert_bias: whether a bias is added for choosing experts (``e_score_correction_bias``).
        normalized: whether the weights of the chosen experts sum to one.
        scaling: what the weights are multiplied by.
    """

    layers: tuple[bool, ...]
    experts: int
    top_k: int
    width: int
    shared_width: int
    scores: Literal["sigmoid", "softmax"]
    expert_bias: bool
    normalized: bool
    scaling: float


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Everything that weights and computation depend on; names as in Hugging Face configs.

    Attributes:
        family: ``model_type`` of the Hugging Face config.
        intermediate_size: inner size of dense layers.
        partial_rotary_factor: share of ``head_dim`` that is rotated, the first of it.
        attention_bias: whether queries, keys and values have a bias.
        qk_norm: whether queries and keys are normalised, per head, before they are rotated.
        prediction_layers: multi-token prediction layers behind the decoder, as deep as its last layer is.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    attention_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    initializer_range: float
    moe: MoeConfig | None
    prediction_layers: int

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer ``layer`` (0-based) has routed experts; prediction layers are like the last one."""
        return self.moe is not None and self.moe.layers[min(layer, self.num_hidden_layers - 1)]
