"""What is saved, what stays, and what a run does about checkpoints that are not whole."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_klong.config import ParallelConfig, SftConfig, load_config
from megatron_klong.data.rows import PackedRow
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import (
    CheckpointSaver,
    Kept,
    load_checkpoint,
    resume_checkpoint,
)
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.sft import SftProgress, run_sft
from megatron_klong.training.step import train_step
from megatron_klong.training.stopping import Stopped
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import ReferenceModel
from tests.ranks import RankPool

ROOT = Path(__file__).parents[1]
ONE = ParallelConfig()
TWO_STAGES = ParallelConfig(tensor=2, pipeline=2, expert=2)


def config(store: Path, run: Path, parallel: ParallelConfig, *overrides: str) -> SftConfig:
    (run / "logs").mkdir(parents=True, exist_ok=True)
    layout = (f"parallel.{name}={ways}" for name, ways in parallel.model_dump().items() if ways is not None)
    return load_config(
        SftConfig, ROOT / "examples" / "quickstart" / "sft.yaml",
        [
            f"data.sources.replication.store={store}", f"run.dir={run}", "data.validation_fraction=0",
            "data.row_tokens=256", "data.phases.train.steps=6", "optimizer.warmup_steps=1",
            "training.save_every=2", *layout,
            *overrides,
        ],
    )  # fmt: skip


def run_on_rank(platform: Platform, config: SftConfig) -> str | None:
    try:
        run_sft(config, platform)
    except RankError as error:
        return str(error)
    return None


def losses(run: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "train"]


def held_out(run: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["source"], line["loss"]) for line in lines if line["kind"] == "validation"]


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def forget(run: Path, step: int) -> None:
    """As if a run had ended before its later checkpoints."""
    for folder in (run / "checkpoints").iterdir():
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)


def test_a_run_goes_on_at_other_layouts_with_the_losses_it_would_have_had(
    ranks: RankPool, domain_store: Path, tmp_path: Path
) -> None:
    """TP2 PP2 EP2, PP2 VPP2 EP2, EP4, then DP4: pieces of weights and moments change hands each time."""
    run, keep = tmp_path / "run", ("training.keep_last=9", "training.save_every=1")
    assert (
        ranks.run(run_on_rank, TWO_STAGES, 4, config=config(domain_store, run, TWO_STAGES, *keep))
        == [None] * 4
    )
    expected = losses(run)
    interleaved = ParallelConfig(pipeline=2, virtual=2, expert=2, nproc=4)
    for step, layout in (
        (2, interleaved), (4, ParallelConfig(expert=4, nproc=4)), (5, ParallelConfig(nproc=4)),
    ):  # fmt: skip
        forget(run, step)
        assert (
            ranks.run(run_on_rank, layout, 4, config=config(domain_store, run, layout, *keep)) == [None] * 4
        )
        assert [each[0] for each in losses(run)] == [1, 2, 3, 4, 5, 6]
        for ours, theirs in zip(losses(run), expected):
            assert ours[1:] == pytest.approx(theirs[1:], rel=2e-5)
    assert losses(run)[:4] != expected[:4] or losses(run)[4:] != expected[4:]  # rounding: it did change


def test_the_last_ones_and_every_so_many_stay(ranks: RankPool, domain_store: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = config(
        domain_store, run, ONE, "data.phases.train.steps=9", "training.save_every=1", "training.keep_last=2",
        "training.keep_every=3",
    )  # fmt: skip
    ranks.run(run_on_rank, ONE, 1, config=settings)
    assert names(run) == [f"step_{step:08d}" for step in (3, 6, 8, 9)]


def save_while_training(platform: Platform, folder: Path, out: Path) -> tuple[bool, bool, str]:
    """A checkpoint is started, three steps change everything, and only then its files are written."""
    trainer = build_trainer(reference.settings(ONE, folder), load_hf_config(folder), platform)
    rows = reference.packed(reference.batch())
    train_step(trainer, rows, sft_objective)
    before = _state(trainer)
    gate = threading.Event()
    from megatron_klong.training import background_save

    write = background_save._write

    def late(*arguments: Any) -> None:
        assert gate.wait(60)
        write(*arguments)

    background_save._write = late
    try:
        saver = CheckpointSaver(out, Kept(1))
        final = saver.start(trainer, SftProgress(1))
        early = saver.poll() is None and not final.exists()
        for _ in range(3):
            train_step(trainer, rows, sft_objective)
        changed = not all(torch.equal(a, b) for a, b in zip(before, _state(trainer)))
        gate.set()
        assert saver.finish() == final
    finally:
        background_save._write = write
    assert load_checkpoint(trainer, final, SftProgress) == SftProgress(1)
    same = all(torch.equal(a, b) for a, b in zip(before, _state(trainer)))
    return early and changed, same, ",".join(sorted(path.name for path in out.iterdir()))


def _state(trainer: Any) -> list[Tensor]:
    weights = [weight.detach().clone() for weight in trainer.model.parameters()]
    states = [
        state for part in trainer.optimizer.chained_optimizers for state in part.optimizer.state.values()
    ]
    return weights + [state[key].clone() for state in states for key in sorted(state)]


def test_what_is_saved_in_the_background_is_what_was_when_it_began(ranks: RankPool, tmp_path: Path) -> None:
    folder = ReferenceModel("glm").save(tmp_path / "hf")
    (answer,) = ranks.run(save_while_training, ONE, 1, folder=folder, out=tmp_path / "out")
    assert answer == (True, True, "step_00000001")


class Interrupting:
    """An objective that asks the run to end while a held-out row of the first source is computed."""

    def __init__(self, after: int) -> None:
        self.left = after

    def __call__(self, log_probs_R: Tensor, row: PackedRow, mask_R: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGTERM)
        return sft_objective(log_probs_R, row, mask_R)


def stop_in_evaluation(platform: Platform, config: SftConfig, after: int) -> object:
    with pytest.raises(Stopped) as stopped:
        run_sft(config, platform, Interrupting(after))
    return stopped.value.code


def test_a_run_told_to_stop_in_an_evaluation_saves_and_makes_it_up(
    ranks: RankPool, domain_store: Path, tmp_path: Path
) -> None:
    """It ends before the next source, and the next start begins with what was left out."""
    more = (
        f"data.sources.again.store={domain_store}", "data.phases.train.steps=3",
        "data.validation_fraction=0.2",
        "data.phases.train.sources.again.weight=1", "data.phases.train.sources.replication.weight=3",
        "training.eval_every=1", "training.eval_rows=2", "training.global_batch_rows=2",
        "training.save_every=0", "training.keep_last=9",
    )  # fmt: skip
    whole, cut = (config(domain_store, tmp_path / name, ONE, *more) for name in ("whole", "cut"))
    assert ranks.run(run_on_rank, ONE, 1, config=whole) == [None]
    # Two rows of each of two sources before the first step, then the first row after it.
    assert ranks.run(stop_in_evaluation, ONE, 1, config=cut, after=5) == [143]
    assert names(tmp_path / "cut") == ["step_00000001"]
    assert held_out(tmp_path / "cut") == held_out(tmp_path / "whole")[:2]
    assert ranks.run(run_on_rank, ONE, 1, config=cut) == [None]
    assert held_out(tmp_path / "cut") == held_out(tmp_path / "whole")
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    # A run that ended after its last checkpoint and before its last evaluation makes that up, too.
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut" / "metrics.jsonl").write_text("".join(lines[:-1]))
    assert ranks.run(run_on_rank, ONE, 1, config=cut) == [None]
    assert held_out(tmp_path / "cut") == held_out(tmp_path / "whole")


class Drawn:
    """An objective that notes random numbers of every kind as it goes."""

    def __init__(self) -> None:
        self.numbers: list[tuple[float, ...]] = []

    def __call__(self, log_probs_R: Tensor, row: PackedRow, mask_R: Tensor) -> Tensor:
        self.numbers.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
        return sft_objective(log_probs_R, row, mask_R)


def draw_on_rank(platform: Platform, config: SftConfig) -> list[tuple[float, ...]]:
    drawn = Drawn()
    run_sft(config, platform, drawn)
    return drawn.numbers


def test_a_resumed_run_draws_the_random_numbers_it_would_have_drawn(
    ranks: RankPool, domain_store: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    settings = config(domain_store, run, ONE, "training.keep_last=9", "training.eval_every=0")
    (whole,) = ranks.run(draw_on_rank, ONE, 1, config=settings)
    assert len(whole) == len(set(whole)) == 6 * settings.training.global_batch_rows
    forget(run, 4)
    (rest,) = ranks.run(draw_on_rank, ONE, 1, config=settings)
    assert rest == whole[4 * settings.training.global_batch_rows :]


def choose_on_rank(platform: Platform, root: Path) -> tuple[str, str]:
    said: list[str] = []
    try:
        chosen = resume_checkpoint(root, said.append)
    except RankError as error:
        return "refused", str(error)
    return "" if chosen is None else chosen.name, " ".join(said)


def test_a_run_of_which_no_checkpoint_is_whole_is_not_begun_anew(ranks: RankPool, tmp_path: Path) -> None:
    """Its metrics would go, and a config that was changed by mistake would look like a new run."""
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    answers = ranks.run(choose_on_rank, ParallelConfig(nproc=2), 2, root=tmp_path / "run" / "checkpoints")
    assert answers[0] == answers[1]
    assert answers[0][0] == "refused" and "none of its checkpoints is whole; --fresh deletes" in answers[0][1]


@pytest.mark.parametrize("damage", ["cut", "file", "list"])
def test_a_checkpoint_that_is_not_whole_is_passed_over(
    ranks: RankPool, domain_store: Path, tmp_path: Path, damage: str
) -> None:
    run = tmp_path / "run"
    settings = config(domain_store, run, ONE)
    ranks.run(run_on_rank, ONE, 1, config=settings)
    expected, last = losses(run), run / "checkpoints" / "step_00000006"
    largest = max(last.glob("*.distcp"), key=lambda file: file.stat().st_size)
    if damage == "cut":
        os.truncate(largest, 1000)
    elif damage == "file":
        largest.unlink()
    else:
        (last / "files.json").unlink()
    (said,) = ranks.run(choose_on_rank, ONE, 1, root=run / "checkpoints")
    reason = {"cut": "has 1,000 of ", "file": "is missing", "list": "files.json is missing or unreadable"}[
        damage
    ]
    assert said[0] == "step_00000004" and reason in said[1] and "step_00000006 is damaged" in said[1]
    # What a save that was cut off has left is in nobody's way.
    (run / "checkpoints" / ".step_00000006.unfinished").mkdir()
    ranks.run(run_on_rank, ONE, 1, config=settings)
    assert losses(run) == expected
    aside = [".step_00000006.damaged-1", ".step_00000006.damaged-2"]
    assert names(run) == [aside[0], "step_00000004", "step_00000006"]
    assert ranks.run(choose_on_rank, ONE, 1, root=run / "checkpoints") == [(last.name, "")]
    (last / "files.json").unlink()  # the same step, damaged again
    (said,) = ranks.run(choose_on_rank, ONE, 1, root=run / "checkpoints")
    assert said[0] == "step_00000004" and f"is now {aside[1]}, and may be deleted" in said[1]
    assert names(run) == [*aside, "step_00000004"]


def test_an_old_checkpoint_that_cannot_be_deleted_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody may be reading it, on a file system that keeps what is open."""
    for step in (1, 2, 3):
        (tmp_path / f"step_{step:08d}").mkdir()
    said: list[str] = []
    saver = CheckpointSaver(tmp_path, Kept(1), say=said.append)

    def busy(path: Path) -> None:
        raise OSError(16, "Device or resource busy", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        saver._delete_old()
    assert len(said) == 2 and "checkpoint step_00000001 cannot be deleted: " in said[0]
    saver._delete_old()
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def break_weights(platform: Platform, folder: Path, out: Path, rank: int) -> str:
    trainer = build_trainer(
        reference.settings(ParallelConfig(expert=2), folder), load_hf_config(folder), platform
    )
    if torch.distributed.get_rank() == rank:
        with torch.no_grad():
            next(trainer.model.parameters())[0, 0] = float("inf")
    saver = CheckpointSaver(out, Kept(1))
    try:
        saver.start(trainer, SftProgress(3))
    except RankError as error:
        return str(error)
    return "saved"


def test_weights_that_are_not_finite_on_one_rank_are_not_saved(ranks: RankPool, tmp_path: Path) -> None:
    folder = ReferenceModel("glm").save(tmp_path / "hf")
    layout = ParallelConfig(expert=2)
    said = ranks.run(break_weights, layout, 2, folder=folder, out=tmp_path / "out", rank=1)
    assert said[0] == said[1] and said[0].startswith("weights are not finite after step 3")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="a small disk of one's own needs bubblewrap")
def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    domain_store: Path, tmp_path: Path
) -> None:
    """On a file system that has room for one checkpoint and a half."""
    run = tmp_path / "disk" / "run"
    (tmp_path / "disk").mkdir()
    start = " ".join([
        sys.executable, "-W", "ignore", "-m", "megatron_klong.cli", "sft", "examples/quickstart/sft.yaml",
        f"data.sources.replication.store={domain_store}", f"run.dir={run}", "data.validation_fraction=0",
        "data.phases.train.steps=4", "optimizer.warmup_steps=1", "training.save_every=2",
        "training.keep_last=1",
        "parallel.tensor=1", "parallel.pipeline=1", "parallel.expert=2",
    ])  # fmt: skip
    listed = f"ls {run}/checkpoints"
    script = (
        f"head -c 6M /dev/zero >{tmp_path}/disk/filler; {start}; echo code $?; {listed}; "
        f"rm {tmp_path}/disk/filler; {start}; echo code $?; {listed}"
    )
    done = subprocess.run(
        [
            "bwrap", "--dev-bind", "/", "/", "--size", str(46 << 20), "--tmpfs", tmp_path / "disk",
            "bash", "-c", script,
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    said = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert len(said) == 1, done.stdout + done.stderr
    assert f"checkpoint {run}/checkpoints/step_00000004 could not be written: " in said[0]
    assert "No space left on device" in said[0] and "(make room on a full disk) and start again" in said[0]
    lines = done.stdout.splitlines()
    first = lines.index("code 2")
    assert lines[first + 1] == "step_00000002"
    assert "resumed from step_00000002: 2 steps to go" in done.stdout
    assert lines[-2:] == ["code 0", "step_00000004"]
