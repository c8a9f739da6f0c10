"""What each rank writes of a checkpoint."""

from __future__ import annotations

import itertools
import re
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_klong.config import ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import load_checkpoint, save_checkpoint
from megatron_klong.training.optimizer_state import boxes
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.sft import SftProgress
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import ReferenceModel
from tests.ranks import RankPool


@pytest.mark.parametrize("shape", [(7,), (3, 4), (4, 1), (2, 3, 4), (1, 5, 2), (2, 2, 2, 2)])
def test_boxes_are_a_run_in_order(shape: tuple[int, ...]) -> None:
    """Every run of every shape, against numbers counted in row-major order."""
    whole = np.arange(prod(shape)).reshape(shape)
    for start, stop in itertools.combinations_with_replacement(range(prod(shape) + 1), 2):
        found = boxes(shape, start, stop)
        parts = [
            whole[tuple(slice(offset, offset + size) for offset, size in zip(*box, strict=True))].ravel()
            for box in found
        ]
        assert np.concatenate([np.empty(0, dtype=int), *parts]).tolist() == list(range(start, stop))
        assert len(found) <= 2 * len(shape) - 1


def saved(platform: Platform, folder: Path, out: Path, parallel: ParallelConfig) -> None:
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    save_checkpoint(trainer, SftProgress(0), out, keep_last=1)


@pytest.mark.parametrize(
    "parallel",
    [ParallelConfig(nproc=4), ParallelConfig(expert=2, nproc=4), ParallelConfig(context=2, nproc=4)],
)
def test_every_rank_writes_its_share(ranks: RankPool, tmp_path: Path, parallel: ParallelConfig) -> None:
    """The optimizer's 12 bytes for each parameter by their owners, the 4 of fp32 weights dealt out."""
    weights = ReferenceModel("glm").save(tmp_path / "weights")
    ranks.run(saved, parallel, 4, folder=weights, out=tmp_path / "out", parallel=parallel)
    written = [0] * 4
    for file in (tmp_path / "out" / "step_00000000").glob("*.distcp"):
        match = re.match(r"__(\d+)_", file.name)
        assert match is not None
        written[int(match[1])] += file.stat().st_size
    parameters = sum(each.numel() for each in ReferenceModel("glm").model.parameters())
    assert all(size == pytest.approx(sum(written) / 4, rel=0.05) for size in written)
    assert sum(written) == pytest.approx(16 * parameters, rel=0.06)  # nothing twice


def of_an_earlier_version(platform: Platform, folder: Path, out: Path) -> str:
    parallel = ParallelConfig()
    trainer = build_trainer(reference.settings(parallel, folder), load_hf_config(folder), platform)
    saved = save_checkpoint(trainer, SftProgress(0), out, keep_last=1)
    common = torch.load(saved / "common.pt", weights_only=False)
    del common["optimizer"]["steps"]
    torch.save(common, saved / "common.pt")
    with pytest.raises(RankError) as caught:
        load_checkpoint(trainer, saved, SftProgress)
    return str(caught.value)


def test_a_checkpoint_of_an_earlier_version_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    weights = ReferenceModel("glm").save(tmp_path / "weights")
    (said,) = ranks.run(of_an_earlier_version, ParallelConfig(), 1, folder=weights, out=tmp_path / "out")
    assert "is of an earlier version" in said and "model.weights=" in said
