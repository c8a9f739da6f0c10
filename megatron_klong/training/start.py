"""Starts a supervised fine-tuning run: its own ranks on one node, or as one rank of torchrun or srun."""

from __future__ import annotations

import contextlib
import os
import sys

from megatron_klong.config import SftConfig
from megatron_klong.training.launched import is_requeued, nodes, rank_environment
from megatron_klong.training.local_ranks import run_ranks
from megatron_klong.training.memory_check import check_memory
from megatron_klong.training.preflight import check_sft
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory, sft_identity

_LOCK_SECONDS = 60.0
"""The attempt before may be on its way out, on another node."""


def start_sft(config: SftConfig, *, fresh: bool) -> int:
    """Check, claim the run directory, train; returns the exit code.

    Started by torchrun or srun, this process is one rank; otherwise it starts ``parallel.nproc`` ranks and
    watches them.

    Args:
        fresh: delete an earlier run first; once, where Slurm starts the job again.

    Raises:
        ValueError: a user's error, found before anything is started.
    """
    run = RunDirectory(config.run.dir)
    fresh = fresh and run.may_be_deleted(os.environ)
    wait_seconds = _LOCK_SECONDS if is_requeued(os.environ) else 0.0
    inputs = check_sft(config, resumes=run.has_checkpoints() and not fresh)
    rank = rank_environment(os.environ)
    ranks = config.parallel.world_size if rank is None else int(rank["WORLD_SIZE"])
    config.check_world(ranks)
    if config.run.check_memory:
        settings = config.trainer_settings(config.data.fixed_steps or sys.maxsize)
        rows = config.training.global_batch_rows
        check_memory(inputs.model, settings, ranks, ranks // nodes(os.environ), rows)
    if rank is None:
        with run.locked(wait_seconds=wait_seconds) as lock:
            run.prepare(config, sft_identity(config, inputs, run), fresh=fresh)
            return run_ranks(
                "megatron_klong.training.worker", [str(run.path)], config.parallel.world_size, run.logs,
                stop_seconds=config.training.stop_seconds, keep_open=(lock,),
            )  # fmt: skip

    from megatron_klong.training.worker import train

    os.environ.update(rank)
    with contextlib.ExitStack() as held:
        if rank["RANK"] == "0":
            held.enter_context(run.locked(wait_seconds=wait_seconds))
            run.prepare(config, sft_identity(config, inputs, run), fresh=fresh)
        try:
            train(config)
        except RankError as error:
            raise ValueError(str(error)) from error
    return 0
