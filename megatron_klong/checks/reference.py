"""What transformers says of a model: the independent side of every parity check.

Not for a process in which a Megatron platform is active. There, on CPU, transformers' grouped expert
products come out different in the third digit: the platform has exchanged functions of torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch


def random_prompts(vocab_size: int, longest: int) -> list[tuple[int, ...]]:
    """Prompts of several lengths up to ``longest``, the same ones always."""
    random = np.random.default_rng(0)
    lengths = sorted({max(2, longest // 16), longest // 4 + 1, longest // 2, longest})
    return [tuple(int(t) for t in random.integers(0, vocab_size, length)) for length in lengths]


def reference_log_probs(
    weights: Path, precision: Literal["fp32", "bf16"], prompts: Sequence[tuple[int, ...]]
) -> list[list[float]] | None:
    """Transformers' log-probs of every token but the first; None where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils.logging import disable_progress_bar
    except ImportError:
        return None
    disable_progress_bar()
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, attn_implementation="eager")
    results = []
    with torch.no_grad():
        for ids in prompts:
            table = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)
            results.append([float(table[place, token]) for place, token in enumerate(ids[1:])])
    return results
