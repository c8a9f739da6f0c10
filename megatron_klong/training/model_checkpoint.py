"""Weights of a Megatron distributed checkpoint, without the rest of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing, parallel_state

from megatron_klong.model.row_model import RankModel


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
    copies = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {
        _entry(number): stage.sharded_state_dict(metadata={"dp_cp_group": copies})
        for number, stage in enumerate(model)
    }


def put_model(model: RankModel, loaded: dict[str, Any]) -> None:
    """Set the weights to what was loaded for :func:`sharded_model`."""
    for number, stage in enumerate(model):
        stage.load_state_dict(loaded[_entry(number)])


def _entry(stage: int) -> str:
    return f"model{stage}"
