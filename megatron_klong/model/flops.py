"""Floating-point operations that a model's mathematics needs, whatever an implementation does beside them."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.model.decoder import DecoderConfig

_BACKWARD = 2
"""Times the forward pass: one product for the gradient of each factor."""


@dataclass(frozen=True)
class Work:
    """What a batch asks for.

    Attributes:
        tokens: of all samples, padding excluded.
        attended_pairs: of a query and a key that it sees: n (n + 1) / 2 of a sample of n tokens.
        trained_tokens: those that logits are needed of.
    """

    tokens: int
    attended_pairs: int
    trained_tokens: int


def training_flops(config: DecoderConfig, work: Work, *, prediction: bool = False) -> int:
    """Of a forward and a backward pass; a multiplication and an addition are two operations.

    Matrix products alone: norms, rotations and softmax are below a percent. Recomputed activations do not
    count, nor do padding, masked pairs of attention and logits of tokens without loss.

    Args:
        prediction: whether multi-token prediction layers are trained along.
    """
    layers = sum(_layer(config, work, config.is_moe_layer(n)) for n in range(config.num_hidden_layers))
    head = 2 * work.trained_tokens * config.hidden_size * config.vocab_size
    if prediction:
        last = _layer(config, work, config.is_moe_layer(config.num_hidden_layers))
        joined = 2 * work.tokens * 2 * config.hidden_size**2
        layers += config.prediction_layers * (last + joined)
        head *= 1 + config.prediction_layers
    return (layers + head) * (1 + _BACKWARD)


def _layer(config: DecoderConfig, work: Work, is_moe: bool) -> int:
    """Forward."""
    hidden, queries = config.hidden_size, config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    weights = hidden * (queries + 2 * keys) + queries * hidden
    if is_moe:
        moe = config.moe
        assert moe is not None
        weights += hidden * moe.experts + 3 * hidden * (moe.top_k * moe.width + moe.shared_width)
    else:
        weights += 3 * hidden * config.intermediate_size
    return 2 * work.tokens * weights + 4 * work.attended_pairs * queries
