"""What holds for all ranks before any work: timeouts of their groups, and a folder that all see."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch
from megatron.core import parallel_state

from megatron_klong.config import ParallelConfig
from megatron_klong.platform import Platform
from megatron_klong.training.initialize import set_up_layout
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.shared_folder import check_shared
from tests.ranks import RankPool


def timeouts(platform: Platform, parallel: ParallelConfig, seconds: float) -> list[timedelta]:
    parallel_state.destroy_model_parallel()
    set_up_layout(parallel, 1, timeout_seconds=seconds)
    groups = (
        parallel_state.get_tensor_model_parallel_group(),
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
        parallel_state.get_expert_model_parallel_group(),
    )
    return [group._get_backend(torch.device("cpu")).options._timeout for group in groups]


def test_all_groups_wait_as_long_as_said(ranks: RankPool) -> None:
    """Longer than the watchdog, which names who hangs; Megatron's own 30 minutes would come first."""
    layout = ParallelConfig(tensor=2, nproc=2)
    for found in ranks.run(timeouts, layout, 2, parallel=layout, seconds=3660):
        assert found == [timedelta(minutes=61)] * 4


def look(platform: Platform, folder: Path, shared: bool) -> str:
    mine = folder if shared else folder / f"node{torch.distributed.get_rank()}"
    mine.mkdir(exist_ok=True)
    try:
        check_shared(mine, seconds=1.0)
    except RankError as error:
        return str(error)
    return ""


def test_a_folder_that_is_not_shared_is_refused_by_all(ranks: RankPool, tmp_path: Path) -> None:
    layout = ParallelConfig(nproc=3)
    assert ranks.run(look, layout, 3, folder=tmp_path, shared=True) == [""] * 3
    for said in ranks.run(look, layout, 3, folder=tmp_path, shared=False):
        assert "what rank 0 writes there is not seen by rank 1, 2; it must be on a file system" in said
