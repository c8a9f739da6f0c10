"""Everything about a run that can be wrong before a rank is started. Imports neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.config import SftConfig
from megatron_klong.data.header import StoreHeader, held_out_trajectories, read_header, window_rule
from megatron_klong.model.hf_config import Glm4MoeConfig, load_hf_config
from megatron_klong.model.layout import check_layout


@dataclass(frozen=True)
class CheckedInputs:
    """What a run is about to use: the model's shape and the data's header."""

    model: Glm4MoeConfig
    data: StoreHeader


def check_sft(config: SftConfig) -> CheckedInputs:
    """Check model, layout, data and window against one another.

    Raises:
        ValueError: names the field and the remedy.
    """
    hf = load_hf_config(config.model.hf_config)
    check_layout(hf, config.parallel)
    header = read_header(config.data.store)
    window_rule(config.data.window, header)
    if header.vocab_size > hf.vocab_size:
        raise ValueError(
            f"data.store={config.data.store}: its tokenizer has {header.vocab_size} tokens, more than "
            f"the model's vocab_size={hf.vocab_size}; use the model's own tokenizer"
        )
    held_out_trajectories(config.data, header.trajectories)
    weights = config.model.weights
    if weights is not None and not any((*weights.glob("*.safetensors"), *weights.glob(".metadata"))):
        raise ValueError(
            f"model.weights={weights}: has neither *.safetensors nor a Megatron checkpoint's .metadata"
        )
    return CheckedInputs(hf, header)
