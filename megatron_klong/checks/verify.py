"""``klong convert verify``: two checkpoints by weights, then by what the models say."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_klong.convert.compare import WeightComparison, compare_weights, open_weights
from megatron_klong.convert.folders import OnBytes
from megatron_klong.model.parameters import parameter_counts

_BYTES_A_PARAMETER = 4.5
"""Of memory, to compute in fp32: the weights, and something for activations."""


class AskError(Exception):
    """A model could not be computed."""


@dataclass(frozen=True)
class Spoken:
    """What a model says to a prompt, computed in fp32.

    Attributes:
        by: the implementation, ``transformers`` or ``Megatron-Core``.
        logits: at each token of the prompt, for the whole vocabulary, fp32 ``[T, V]``.
        tokens: what it goes on with, greedily.
    """

    by: str
    logits: np.ndarray
    tokens: list[int]

    def save(self, file: Path) -> None:
        """Write it to an ``.npz`` file."""
        np.savez(file, by=self.by, logits=self.logits, tokens=np.array(self.tokens))


def load_spoken(file: Path) -> Spoken:
    """Read what :meth:`Spoken.save` wrote."""
    with np.load(file) as held:
        return Spoken(str(held["by"]), held["logits"], held["tokens"].tolist())


@dataclass(frozen=True)
class Verification:
    """What was compared.

    Attributes:
        weights: names, shapes and bits.
        not_run: why the models were not compared; empty where they were.
        failed: whether that is because one could not be computed.
        by: the implementation that computed each.
        logits: largest difference of any logit at any token of the prompt.
        scale: standard deviation of the logits, to read that difference by.
        tokens: what each of both went on with.
    """

    weights: WeightComparison
    not_run: str
    failed: bool = False
    by: tuple[str, str] | None = None
    logits: float | None = None
    scale: float | None = None
    tokens: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def passed(self) -> bool:
        """Same bits, logits equal to rounding, the same tokens."""
        if self.weights.differences or self.failed:
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
    on_bytes: OnBytes = lambda done, total: None,
) -> Verification:
    """Compare two checkpoints, Hugging Face folders or Megatron's, in any combination.

    Each model is computed by the implementation that its checkpoint is for, in a process of its own.

    Args:
        prompt: token ids; default 24 random ones.
        generate: tokens that both go on with.
        weights_only: leave the models unasked.
        on_bytes: called with the bytes compared and those of all tensors.

    Raises:
        ValueError: names or shapes do not fit; the prompt has an id that is none of the vocabulary.
    """
    _, config = open_weights(one)
    ids = prompt or np.random.default_rng(0).integers(0, config.vocab_size, 24).tolist()
    if not all(0 <= token < config.vocab_size for token in ids):
        raise ValueError(f"prompt: ids must be from 0 to {config.vocab_size - 1}, got {list(ids)}")
    weights = compare_weights(one, two, on_bytes=on_bytes)
    reason = "not asked for" if weights_only else _too_large(parameter_counts(config).total)
    if reason:
        return Verification(weights, reason)
    try:
        ours, theirs = (_ask(folder, ids, generate) for folder in (one, two))
    except AskError as error:  # the weights are compared; that took hours with a large model
        return Verification(weights, str(error), failed=True)
    return Verification(
        weights, "", by=(ours.by, theirs.by), logits=float(np.abs(ours.logits - theirs.logits).max()),
        scale=float(ours.logits.std()), tokens=(tuple(ours.tokens), tuple(theirs.tokens)),
    )  # fmt: skip


def _too_large(parameters: int) -> str:
    needed, free = parameters * _BYTES_A_PARAMETER, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return f"{needed / 1e9:,.1f} GB of memory are needed to compute in fp32, {free / 1e9:,.1f} GB are free"


def _ask(folder: Path, prompt: Sequence[int], generate: int) -> Spoken:
    with tempfile.TemporaryDirectory(prefix="klong-verify-") as temporary:
        answer = Path(temporary) / "answer.npz"
        arguments = [str(folder), json.dumps(list(prompt)), str(generate), str(answer)]
        done = subprocess.run(
            [sys.executable, "-m", "megatron_klong.checks.verify_worker", *arguments],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise AskError(f"{folder}: could not be computed: {last}")
        return load_spoken(answer)
