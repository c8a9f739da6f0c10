"""Whether a model can be divided as a layout says. Imports no torch: it is asked before a start."""

from __future__ import annotations

from megatron_klong.config import ParallelConfig
from megatron_klong.model.decoder import DecoderConfig


def check_layout(hf: DecoderConfig, parallel: ParallelConfig) -> None:
    """Refuse a model that a layout cannot divide, before anything is started.

    Raises:
        ValueError: names the two fields and their values.
    """
    tensor = parallel.tensor
    divided = [
        ("num_key_value_heads", hf.num_key_value_heads, "tensor", tensor),
        ("vocab_size", hf.vocab_size, "tensor", tensor),
        ("intermediate_size", hf.intermediate_size, "tensor", tensor),
        ("num_hidden_layers", hf.num_hidden_layers, "pipeline", parallel.pipeline),
    ]
    if hf.moe is not None:
        divided.append(("size of all shared experts", hf.moe.shared_width, "tensor", tensor))
        divided.append(("number of experts", hf.moe.experts, "expert", parallel.expert))
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert={parallel.expert}: the model has no experts; use 1")
    for name, size, by, ways in divided:
        if size % ways:
            raise ValueError(
                f"parallel.{by}={ways} does not divide the model's {name}={size}; choose a divisor of {size}"
            )
