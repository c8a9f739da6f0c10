"""Whether a model fits a layout and the settings of a run. Imports no torch: it is asked before a start."""

from __future__ import annotations

from megatron_klong.config import ModelConfig, ParallelConfig
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
        ("hidden_size", hf.hidden_size, "tensor", tensor),
    ]
    if hf.moe is not None:
        divided.append(("size of all shared experts", hf.moe.shared_width, "tensor", tensor))
        divided.append(("number of experts", hf.moe.experts, "expert", parallel.expert))
    elif parallel.expert > 1:
        raise ValueError(f"parallel.expert={parallel.expert}: the model has no experts; use 1")
    if parallel.stages > hf.num_hidden_layers:
        times = f" x parallel.virtual={parallel.virtual}" if parallel.virtual > 1 else ""
        raise ValueError(
            f"parallel.pipeline={parallel.pipeline}{times} exceeds the model's "
            f"num_hidden_layers={hf.num_hidden_layers}; each stage needs a layer"
        )
    for name, size, by, ways in divided:
        if size % ways:
            raise ValueError(
                f"parallel.{by}={ways} does not divide the model's {name}={size}; choose a divisor of {size}"
            )


def check_settings(hf: DecoderConfig, settings: ModelConfig) -> None:
    """Refuse settings that would have no effect on a model.

    Raises:
        ValueError: names the field and what the model lacks.
    """
    router = settings.router
    for field, is_set, has, what in (
        ("model.prediction=train", settings.prediction == "train", hf.prediction_layers, "prediction layers"),
        (f"model.router.balancing={router.balancing}", router.balancing != "none", hf.moe, "experts"),
        ("model.router.replay=true", router.replay, hf.moe, "experts"),
        (
            f"model.router.bias_update_rate={router.bias_update_rate}",
            router.bias_update_rate,
            hf.moe and hf.moe.expert_bias,
            "bias for choosing experts",
        ),
    ):
        if is_set and not has:
            raise ValueError(f"{field}: the model has no {what}; leave the setting out")
