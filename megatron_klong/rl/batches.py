"""Batch directories: what the orchestrator hands to the trainer. Imports no torch.

``batches/00003/`` holds the windows of iteration 3 in ``windows.npz`` and their names in ``batch.json``.
It has its name only when complete, and never changes after.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict

from megatron_klong.data.windows import TrainingSample
from megatron_klong.rl.experience import Segment


class BatchHeader(BaseModel):
    """``batch.json``.

    Attributes:
        iteration: counted from 1.
        stage: its number, from 0.
        version: the weights that the rollouts were sampled from.
        groups: ids of the groups in it.
        rollouts: ids of the rollouts in it, in the order of their numbers.
        scores: of each.
        advantages: of each.
        checked: rollouts of the iteration whose every prompt was compared with the windows; also those of
            groups that are not in the batch.
        dropped_groups: without two graded rollouts, and so without a baseline.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    iteration: int
    stage: int
    version: str
    groups: tuple[str, ...]
    rollouts: tuple[str, ...]
    scores: tuple[float, ...]
    advantages: tuple[float, ...]
    checked: int
    dropped_groups: int


@dataclass(frozen=True)
class Batch:
    """A batch; the sample's ``trajectory`` is the number of its rollout."""

    header: BatchHeader
    segments: tuple[Segment, ...]


def batch_folder(root: Path, iteration: int) -> Path:
    """Where a batch belongs."""
    return root / f"{iteration:05d}"


def write_batch(root: Path, header: BatchHeader, segments: Sequence[Segment]) -> None:
    """Write a batch directory; complete or absent."""
    final = batch_folder(root, header.iteration)
    unfinished = root / f".{final.name}.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    samples = [segment.sample for segment in segments]
    np.savez(
        unfinished / "windows.npz",
        tokens=np.concatenate([sample.tokens_T for sample in samples]).astype(np.int32),
        mask=np.concatenate([sample.loss_mask_T for sample in samples]),
        log_probs=np.concatenate([segment.log_probs for segment in segments]),
        lengths=np.array([len(sample.tokens_T) for sample in samples], dtype=np.int64),
        rollout=np.array([sample.trajectory for sample in samples], dtype=np.int64),
        window=np.array([sample.window for sample in samples], dtype=np.int64),
    )
    (unfinished / "batch.json").write_text(header.model_dump_json(indent=1) + "\n")
    unfinished.replace(final)


def read_header(root: Path, iteration: int) -> BatchHeader:
    """What a batch directory says of itself."""
    return BatchHeader.model_validate_json((batch_folder(root, iteration) / "batch.json").read_text())


def read_batch(root: Path, iteration: int) -> Batch:
    """Read a batch directory."""
    folder, header = batch_folder(root, iteration), read_header(root, iteration)
    with np.load(folder / "windows.npz") as arrays:
        tokens, mask, lengths = arrays["tokens"].astype(np.int64), arrays["mask"], arrays["lengths"]
        starts = np.cumsum([0, *lengths])
        trained = np.cumsum([0, *(mask[a:b].sum() for a, b in zip(starts, starts[1:]))])
        segments = tuple(
            Segment(
                TrainingSample(tokens[starts[n] : starts[n + 1]], mask[starts[n] : starts[n + 1]],
                               int(arrays["rollout"][n]), int(arrays["window"][n])),
                arrays["log_probs"][trained[n] : trained[n + 1]],
            )
            for n in range(len(lengths))
        )  # fmt: skip
    return Batch(header, segments)
