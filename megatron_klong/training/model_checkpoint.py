"""Weights of a Megatron distributed checkpoint, without the rest of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel


def checkpoint_metadata() -> dict[str, Any]:
    """How Megatron lays out what it saves; a new dictionary each time, since it notes groups in it."""
    return {
        # Megatron 0.16 refuses its default optimizer format; this one can be read at another layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
    }


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint."""
    return (folder / ".metadata").is_file()


def load_model(model: GPTModel, folder: Path) -> None:
    """Read the weights at this run's layout; all ranks take part."""
    state = {"model": model.sharded_state_dict(metadata=checkpoint_metadata())}
    model.load_state_dict(dist_checkpointing.load(state, str(folder))["model"])
