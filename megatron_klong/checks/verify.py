"""``klong convert verify``: two checkpoints by weights, then by what the models say."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_klong.convert.compare import WeightComparison, compare_weights
from megatron_klong.convert.folders import checkpoint_folder
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weights import parameter_counts

_BYTES_A_PARAMETER = 4.5
"""Of memory, to compute in fp32: the weights, and something for activations."""


@dataclass(frozen=True)
class Spoken:
    """What a model says to a prompt, computed in fp32.

    Attributes:
        by: the implementation, ``transformers`` or ``Megatron-Core``.
        logits: at each token of the prompt, for the whole vocabulary, ``[T][V]``.
        tokens: what it goes on with, greedily.
    """

    by: str
    logits: list[list[float]]
    tokens: list[int]


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        weights: names, shapes and bits.
        not_run: why the models were not asked; empty where they were.
        by: the implementation that computed each.
        logits: largest difference of any logit at any token of the prompt.
        scale: standard deviation of the logits, to read that difference by.
        tokens: what each of both went on with.
    """

    weights: WeightComparison
    not_run: str
    by: tuple[str, str] | None = None
    logits: float | None = None
    scale: float | None = None
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def passed(self) -> bool:
        """Same bits, logits equal to rounding, the same tokens."""
        if self.weights.differences:
            return False
        if self.not_run:
            return True
        assert self.logits is not None and self.scale is not None and self.tokens is not None
        return self.logits < 1e-3 * max(self.scale, 1.0) and self.tokens[0] == self.tokens[1]


def verify(
    one: Path,
    two: Path,
    *,
    prompt: Sequence[int] | None = None,
    generate: int = 16,
    weights_only: bool = False,
    on_tensor: Callable[[], None] = lambda: None,
) -> Verification:
    """Compare two checkpoints, Hugging Face folders or Megatron's, in any combination.

    Each model is computed by the implementation that its checkpoint is for, in a process of its own.

    Args:
        prompt: token ids; default 24 random ones.
        generate: tokens that both go on with.
        weights_only: leave the models unasked.
        on_tensor: called after every tensor.

    Raises:
        ValueError: names or shapes do not fit; the prompt has an id that is none of the vocabulary.
    """
    weights = compare_weights(one, two, on_tensor=on_tensor)
    config = load_hf_config(_with_config(one))
    ids = prompt or np.random.default_rng(0).integers(0, config.vocab_size, 24).tolist()
    if not all(0 <= token < config.vocab_size for token in ids):
        raise ValueError(f"prompt: ids must be from 0 to {config.vocab_size - 1}, got {list(ids)}")
    reason = "not asked for" if weights_only else _too_large(parameter_counts(config).total)
    if reason:
        return Verification(weights, reason)
    ours, theirs = (_ask(folder, ids, generate) for folder in (one, two))
    first, second = np.array(ours.logits), np.array(theirs.logits)
    return Verification(
        weights, "", (ours.by, theirs.by), float(np.abs(first - second).max()), float(first.std()),
        (tuple(ours.tokens), tuple(theirs.tokens)),
    )  # fmt: skip


def _with_config(folder: Path) -> Path:
    return folder if (folder / "config.json").is_file() else checkpoint_folder(folder)


def _too_large(parameters: int) -> str:
    needed, free = parameters * _BYTES_A_PARAMETER, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return f"{needed / 1e9:,.1f} GB of memory are needed to compute in fp32, {free / 1e9:,.1f} GB are free"


def _ask(folder: Path, prompt: Sequence[int], generate: int) -> Spoken:
    with tempfile.TemporaryDirectory(prefix="klong-verify-") as temporary:
        answer = Path(temporary) / "answer.json"
        arguments = [str(folder), json.dumps(list(prompt)), str(generate), str(answer)]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_klong.checks.verify_worker", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"{folder}: the model could not be computed: {last}")
        return Spoken(**json.loads(answer.read_text()))
