"""Weights of a Megatron distributed checkpoint, without the rest of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_klong.model.row_model import RankModel


def checkpoint_metadata() -> dict[str, Any]:
    """How Megatron lays out what it saves; a new dictionary each time, since it notes groups in it."""
    return {
        # Megatron 0.16 refuses its default optimizer format; this one can be read at another layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        "chained_optim_avoid_prefix": True,
        # Else it gathers moments on the devices, a whole buffer of gradients' worth at a time.
        "distrib_optim_fully_reshardable_mem_efficient": True,
    }


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a distributed checkpoint."""
    return (folder / ".metadata").is_file()


def load_model(model: RankModel, folder: Path) -> None:
    """Read the weights at this run's layout; all ranks take part."""
    put_model(model, dist_checkpointing.load(sharded_model(model), str(folder)))


def sharded_model(model: RankModel) -> dict[str, Any]:
    """What a checkpoint holds of the model: an entry for each of this rank's stages.

    The entries' names are this rank's; what is inside says its own place in the whole model.
    """
    return {
        _entry(number): stage.sharded_state_dict(metadata=checkpoint_metadata())
        for number, stage in enumerate(model)
    }


def put_model(model: RankModel, loaded: dict[str, Any]) -> None:
    """Set the weights to what was loaded for :func:`sharded_model`."""
    for number, stage in enumerate(model):
        stage.load_state_dict(loaded[_entry(number)])


def _entry(stage: int) -> str:
    return f"model{stage}"
