"""One model of a verification: ``python -m megatron_klong.checks.verify_worker FOLDER PROMPT COUNT OUT``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from megatron_klong.config import ModelConfig, ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import import_megatron

if TYPE_CHECKING:
    from megatron_klong.checks.verify import Spoken

Model = Callable[[list[int]], Tensor]
"""Token ids to logits, fp32 ``[T, V]``."""


def by_transformers(folder: Path) -> Model:
    """The implementation of a Hugging Face folder."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return lambda ids: model(torch.tensor([ids])).logits[0]


def by_megatron(checkpoint: Path) -> Model:
    """The implementation of a distributed checkpoint, on this process's one rank."""
    from megatron_klong.model.gpt import build_model
    from megatron_klong.model.row import row_layout
    from megatron_klong.platform import activate
    from megatron_klong.training.model_checkpoint import load_model

    settings = ModelConfig(hf_config=checkpoint, precision="fp32")
    device = activate().device
    whole = build_model(load_hf_config(checkpoint), ParallelConfig(), settings, row_tokens=1).to(device)
    load_model(whole, checkpoint)
    (model,) = whole.eval()

    def logits(ids: list[int]) -> Tensor:
        layout = row_layout(np.array([0, len(ids)]), 0, 1, device)
        return model(torch.tensor([ids], device=device), layout)[0].cpu()

    return logits


@torch.no_grad()
def speak(model: Model, by: str, prompt: list[int], count: int) -> Spoken:
    """Logits of the prompt, and greedy tokens after it."""
    from megatron_klong.checks.verify import Spoken

    known = model(prompt).float()
    ids = [*prompt]
    for _ in range(count):
        ids.append(int(model(ids)[-1].argmax()))
    return Spoken(by, known.numpy(), ids[len(prompt) :])


def main() -> None:
    """See the module."""
    import_megatron()
    from megatron_klong.convert.compare import is_hf_folder
    from megatron_klong.convert.folders import checkpoint_folder
    from megatron_klong.training.initialize import distributed

    folder, prompt, count, out = (
        Path(sys.argv[1]),
        json.loads(sys.argv[2]),
        int(sys.argv[3]),
        Path(sys.argv[4]),
    )
    if is_hf_folder(folder):
        spoken = speak(by_transformers(folder), "transformers", prompt, count)
    else:
        with tempfile.TemporaryDirectory() as meeting:
            at = f"file://{meeting}/rendezvous"
            with distributed(ParallelConfig(), seed=1, init_method=at, rank=0, world_size=1):
                model = by_megatron(checkpoint_folder(folder))
                spoken = speak(model, "Megatron-Core", prompt, count)
    spoken.save(out)


if __name__ == "__main__":
    main()
