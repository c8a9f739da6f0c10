"""Servers beside a trainer: how many GPUs each takes, and how many contexts it holds."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.parameters import parameter_counts

_SIZE = 2
"""Bytes of a number: weights, keys and values are bf16."""

_SERVER_SHARE = 0.9
"""Of a GPU's memory, that vLLM takes by default."""

_WORKING_BYTES = 4_000_000_000
"""Of activations and graphs on each GPU; stated, not measured."""


@dataclass(frozen=True)
class Serving:
    """GPUs for inference.

    Attributes:
        servers: vLLM servers.
        tensor_parallel: GPUs of each.
        context_bytes: of the keys and values of one context of full length, on all its GPUs together.
        contexts: of full length that fit all servers at a time.
    """

    servers: int
    tensor_parallel: int
    context_bytes: int
    contexts: int


def plan_serving(
    hf: DecoderConfig, gpus: int, node: int, device_bytes: int, context_tokens: int
) -> Serving | None:
    """Servers of the fewest GPUs each that hold the weights and one whole context; None if none does.

    A server is one process, so that its GPUs are of one node.
    """
    weights = _SIZE * parameter_counts(hf).total
    for ways in (1, 2, 4, 8, 16):
        if ways > min(gpus, node) or hf.num_attention_heads % ways:
            continue
        # Heads for keys and values are copied where there are fewer than GPUs.
        copies = max(1, ways // hf.num_key_value_heads)
        token = 2 * _SIZE * hf.num_hidden_layers * hf.num_key_value_heads * hf.head_dim * copies
        free = ways * (int(_SERVER_SHARE * device_bytes) - _WORKING_BYTES) - weights
        if free >= token * context_tokens:
            servers = gpus // ways
            return Serving(
                servers, ways, token * context_tokens, servers * (free // (token * context_tokens))
            )
    return None
