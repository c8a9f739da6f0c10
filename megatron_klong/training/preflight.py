"""Everything about a run that can be wrong before a rank is started. Imports neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_klong.config import SftConfig
from megatron_klong.data.header import StoreHeader, read_headers
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout, check_settings


@dataclass(frozen=True)
class CheckedInputs:
    """What a run is about to use: the model's shape and the headers of all sources by name."""

    model: DecoderConfig
    data: dict[str, StoreHeader]


def check_sft(config: SftConfig, *, resumes: bool = False) -> CheckedInputs:
    """Check model, layout, data and window against one another.

    Args:
        resumes: the run has checkpoints, so that it needs no first weights.

    Raises:
        ValueError: names the field and the remedy.
    """
    hf = load_hf_config(config.model.shape)
    check_layout(hf, config.parallel)
    check_settings(hf, config.model)
    headers = read_headers(config.data)
    name, header = next(iter(headers.items()))  # all have the same tokenizer
    if header.vocab_size > hf.vocab_size:
        raise ValueError(
            f"data.sources.{name}.store={config.data.sources[name].store}: its tokenizer has "
            f"{header.vocab_size} tokens, more than the model's vocab_size={hf.vocab_size}; use the model's "
            "own tokenizer"
        )
    weights = config.model.weights
    if weights is not None and not resumes and not has_weights(weights):
        raise ValueError(
            f"model.weights={weights}: has neither *.safetensors nor a Megatron checkpoint's .metadata"
        )
    return CheckedInputs(hf, headers)


def has_weights(folder: Path) -> bool:
    """Whether it is a Hugging Face folder with safetensors, or a Megatron checkpoint."""
    return any((*folder.glob("*.safetensors"), *folder.glob(".metadata")))
