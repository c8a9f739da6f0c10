"""Everything about a run that can be wrong before a rank is started. Imports neither torch nor Megatron."""

from __future__ import annotations

from megatron_klong.config import SftConfig
from megatron_klong.data.header import StoreHeader, read_header, window_rule
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout


def check_sft(config: SftConfig) -> StoreHeader:
    """Check model, layout, data and window against one another; returns the data's header.

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
    return header
