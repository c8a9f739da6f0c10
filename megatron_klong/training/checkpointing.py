"""Checkpoints by Megatron's distributed checkpointing: saved at any layout, complete or absent."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from megatron.core import dist_checkpointing

from megatron_klong.training.model_checkpoint import checkpoint_metadata
from megatron_klong.training.optimizer_state import allocate_moments, load_optimizer
from megatron_klong.training.trainer import Trainer

_STEP_DIR = re.compile(r"step_(\d{8})")


class Progress(Protocol):
    """Where a run stands: a dataclass of what is to be known when it goes on.

    Attributes:
        step: optimizer steps done.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def step(self) -> int: ...


ProgressKind = TypeVar("ProgressKind", bound=Progress)


@dataclass(frozen=True)
class SftProgress:
    """Where a supervised run stands.

    Attributes:
        step: optimizer steps done.
        next_row: position of the next row in the data.
    """

    step: int
    next_row: int


def checkpoint_dir(root: Path, step: int) -> Path:
    """The folder of a step's checkpoint."""
    return root / f"step_{step:08d}"


def latest_checkpoint(root: Path) -> Path | None:
    """The complete checkpoint of the highest step; unfinished ones have another name."""
    found = _complete(root)
    return found[-1] if found else None


def save_checkpoint(trainer: Trainer, progress: Progress, root: Path, keep_last: int) -> Path:
    """Write model, its config, optimizer, schedule and progress; all ranks take part.

    The folder has its final name only when everything is in it. Then the oldest checkpoints beyond
    ``keep_last`` are deleted.
    """
    final = checkpoint_dir(root, progress.step)
    unfinished = final.with_name(f".{final.name}.unfinished")
    first = torch.distributed.get_rank() == 0
    if first:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    torch.distributed.barrier()
    state = _sharded_state(trainer, is_loading=False) | {
        "scheduler": trainer.scheduler.state_dict(),
        "progress": asdict(progress),
    }
    dist_checkpointing.save(state, str(unfinished), content_metadata=checkpoint_metadata())
    torch.distributed.barrier()
    if first:
        shutil.copyfile(trainer.hf_config, unfinished / "config.json")
        shutil.rmtree(final, ignore_errors=True)
        os.replace(unfinished, final)
        for old in _complete(root)[:-keep_last]:
            shutil.rmtree(old)
    torch.distributed.barrier()
    return final


def load_checkpoint(trainer: Trainer, folder: Path, kind: type[ProgressKind]) -> ProgressKind:
    """Restore everything :func:`save_checkpoint` wrote, at this run's layout.

    Args:
        kind: of the progress that was saved.
    """
    allocate_moments(trainer.optimizer)
    loaded = dist_checkpointing.load(_sharded_state(trainer, is_loading=True), str(folder))
    trainer.model.module.load_state_dict(loaded["model"])
    load_optimizer(trainer.optimizer, loaded["optimizer"])
    trainer.scheduler.load_state_dict(loaded["scheduler"])
    return kind(**loaded["progress"])


def _sharded_state(trainer: Trainer, *, is_loading: bool) -> dict[str, Any]:
    model = trainer.model.module.sharded_state_dict(metadata=checkpoint_metadata())
    optimizer = trainer.optimizer.sharded_state_dict(
        model, is_loading=is_loading, metadata=checkpoint_metadata()
    )
    return {"model": model, "optimizer": optimizer}


def _complete(root: Path) -> list[Path]:
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _STEP_DIR.fullmatch(path.name))
