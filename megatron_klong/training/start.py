"""Starts a supervised fine-tuning run: its own ranks on one node, or as one rank of torchrun."""

from __future__ import annotations

import os

from megatron_klong.config import SftConfig
from megatron_klong.training.local_ranks import run_ranks
from megatron_klong.training.preflight import check_sft
from megatron_klong.training.run_directory import RunDirectory, sft_identity


def start_sft(config: SftConfig, *, fresh: bool) -> int:
    """Check, claim the run directory, train; returns the exit code.

    With ``RANK`` and ``WORLD_SIZE`` in the environment (torchrun), this process is one rank;
    otherwise it starts ``parallel.nproc`` ranks and watches them.

    Raises:
        ValueError: a user's error, found before anything is started.
    """
    inputs = check_sft(config)
    run = RunDirectory(config.run.dir)
    if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        with run.locked():
            run.prepare(config, sft_identity(config, inputs), fresh=fresh)
            world = config.parallel.world_size
            return run_ranks("megatron_klong.training.worker", [str(run.path)], world, run.logs)

    from megatron_klong.training.worker import train

    config.check_world(int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] != "0":
        train(config)
        return 0
    with run.locked():
        run.prepare(config, sft_identity(config, inputs), fresh=fresh)
        train(config)
    return 0
