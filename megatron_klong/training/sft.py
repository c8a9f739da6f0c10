"""The supervised fine-tuning loop."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core import parallel_state

from megatron_klong.config import SftConfig
from megatron_klong.data.dataset import build_datasets
from megatron_klong.data.rows import PackedRow, PackedRows, balanced, fill_row
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weights import parameter_counts
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import (
    SftProgress,
    checkpoint_dir,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.metrics import MetricsLog
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.step import evaluate, train_step
from megatron_klong.training.trainer import build_trainer


def run_sft(config: SftConfig, platform: Platform) -> None:
    """Train from the last checkpoint of the run directory, or from the start, to the last step."""
    run, settings = RunDirectory(config.run.dir), config.training
    hf = load_hf_config(config.model.shape)
    train, validation = build_datasets(config.data, config.run.seed)
    rows = PackedRows(train, config.data.row_length, config.run.seed)
    held_out = (
        _evaluation_rows(PackedRows(validation, config.data.row_length, 0), settings.eval_rows)
        if validation
        else []
    )
    trainer = build_trainer(config.trainer_settings, hf, platform)

    progress = SftProgress(step=0, next_row=0)
    saved = latest_checkpoint(run.checkpoints)
    if saved is not None:
        progress = load_checkpoint(trainer, saved, SftProgress)
    writes = torch.distributed.get_rank() == 0
    if writes:
        run.truncate_metrics(-1 if saved is None else progress.step)

    with MetricsLog(
        run.metrics, writes=writes, total_steps=settings.steps, log_every=settings.log_every
    ) as log:
        log.say(
            f"{parameter_counts(hf).total:,} parameters on {platform.name}, {_layout(config)}; "
            f"{len(train)} train and {len(validation or ())} held-out windows, "
            f"{rows.rows_per_epoch} rows of {config.data.row_length} tokens per epoch"
        )
        if saved is not None:
            log.say(f"resumed from {saved.name}: {settings.steps - progress.step} steps to go")
        elif held_out and settings.eval_every:
            log.evaluation(0, evaluate(trainer, held_out, sft_objective))
        for step in range(progress.step + 1, settings.steps + 1):
            batch = _global_batch(rows, progress.next_row, settings.global_batch_rows)
            log.step(step, train_step(trainer, batch, sft_objective))
            progress = SftProgress(step, progress.next_row + settings.global_batch_rows)
            last = step == settings.steps
            if held_out and settings.eval_every and (last or step % settings.eval_every == 0):
                log.evaluation(step, evaluate(trainer, held_out, sft_objective))
            if last or (settings.save_every and step % settings.save_every == 0):
                save_checkpoint(trainer, progress, run.checkpoints, settings.keep_last)
                log.skip_time()
        log.finish(checkpoint_dir(run.checkpoints, progress.step))


def _global_batch(rows: PackedRows, start: int, count: int) -> list[PackedRow]:
    """This data-parallel rank's rows of the global batch that begins at row ``start``."""
    costs = [rows.cost(position) for position in range(start, start + count)]
    mine = balanced(costs, parallel_state.get_data_parallel_world_size())
    return [rows.row(start + row) for row in mine[parallel_state.get_data_parallel_rank()]]


def _evaluation_rows(rows: PackedRows, most: int) -> list[PackedRow]:
    """This rank's part of the first rows of the held-out data, filled up with empty rows.

    All ranks need equally many: expert-parallel ranks of different data-parallel ranks meet in
    every layer.
    """
    count = min(most, rows.rows_per_epoch)
    ways = parallel_state.get_data_parallel_world_size()
    padded = -(-count // ways) * ways
    return [
        rows.row(position) if position < count else fill_row([], rows.row_tokens)
        for position in _mine(0, padded)
    ]


def _mine(start: int, count: int) -> Iterator[int]:
    rank, ways = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    yield from range(start + rank, start + count, ways)


def _layout(config: SftConfig) -> str:
    world, parallel = torch.distributed.get_world_size(), config.parallel
    return (
        f"{world} ranks: TP{parallel.tensor} CP{parallel.context} PP{parallel.pipeline} EP{parallel.expert} "
        f"DP{parallel.data(world)}"
    )
