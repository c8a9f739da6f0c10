"""What a dry run says, against what is so."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_klong.config import ModelConfig, ParallelConfig
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.training.checkpointing import save_checkpoint
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.sft import SftProgress
from megatron_klong.training.step import train_step
from megatron_klong.training.trainer import build_trainer
from tests import reference
from tests.families import ReferenceModel, changed
from tests.ranks import RankPool
from tests.test_sft import KLONG, ROOT, STORE, arguments, metrics, sft


def planned(*arguments: str) -> dict[str, Any]:
    command = [*KLONG, "sft", "examples/quickstart/sft.yaml", *arguments, "--dry-run", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def test_a_plan_is_what_the_run_becomes(domain_store: Path, tmp_path: Path) -> None:
    """Without `steps`: they follow from the data. And nothing is written by a dry run."""
    run = tmp_path / "run"
    phases = "data.phases={only: {sources: {replication: {epochs: 1.5}}}}"
    plan = planned(*arguments(domain_store, run, phases)[len(KLONG) + 2 :])
    assert not run.exists()
    sft(domain_store, run, phases)
    lines = [line for line in metrics(run) if line["kind"] == "train"]
    assert plan["steps"] == len(lines) == plan["phases"][0]["steps"]
    assert sum(line["tokens"] for line in lines) == pytest.approx(plan["phases"][0]["tokens"], rel=0.05)
    assert (plan["ranks"], plan["layout"]) == (4, "4 ranks: TP2 CP1 PP2 EP2 DP1")
    assert (plan["rows_per_step"], plan["micro_batches"], plan["row_tokens"]) == (2, 2, 256)
    newest = max((run / "checkpoints").iterdir())
    on_disk = sum(file.stat().st_size for file in newest.iterdir())
    assert plan["checkpoint_bytes"] < on_disk < 1.05 * plan["checkpoint_bytes"]
    assert plan["disk_bytes"] == min(3, -(-plan["steps"] // 2)) * plan["checkpoint_bytes"]


def test_glm_air_at_256_ranks_on_a_laptop(domain_store: Path, tmp_path: Path) -> None:
    plan = planned(
        f"{STORE}={domain_store}", f"run.dir={tmp_path / 'run'}", "data.validation_fraction=0",
        "model.hf_config=null", "model.preset=glm-4.5-air", "model.precision=bf16", "parallel.tensor=4",
        "parallel.pipeline=2", "parallel.expert=8", "parallel.context=2", "--nproc", "256",
        "training.global_batch_rows=32",
    )  # fmt: skip
    assert plan["parameters"] == {
        "total": 106_852_245_504, "active": 13_424_123_904, "prediction": 2_375_059_456,
    }  # fmt: skip
    assert [place["rank"] for place in plan["pipeline"]] == [0, 128]
    # By hand, of TP4 and EP8: an expert layer has 16 experts and a quarter of all but norms and router.
    hidden, expert = 4096, 3 * 4096 * 1408
    attention = (hidden * 14336 + 14336 + 12288 * hidden) // 4 + hidden
    layer = attention + hidden + 128 * hidden + 16 * expert + expert // 4
    dense = attention + hidden + 3 * hidden * 10944 // 4
    words = 151552 * hidden // 4
    assert plan["pipeline"][0]["parameters"] == words + dense + 22 * layer
    # A prediction layer: a layer, three norms, the product of two states; and the embedding again.
    prediction = layer + 3 * hidden + 2 * hidden * hidden // 4
    assert plan["pipeline"][1]["parameters"] == 23 * layer + hidden + words + prediction + words
    weights = 2 * (106_852_245_504 + 2_375_059_456) + 4 * 46 * 128
    assert plan["checkpoint_bytes"] == weights + 12 * 106_852_245_504


def save_one(platform: Platform, folder: Path, out: Path, model: dict[str, Any]) -> int:
    settings = changed(reference.settings(ParallelConfig(), folder), **model)
    trainer = build_trainer(settings, load_hf_config(folder), platform)
    train_step(trainer, reference.packed(reference.batch()), sft_objective)
    final = save_checkpoint(trainer, SftProgress(1), out, keep_last=1)
    return sum(file.stat().st_size for file in final.glob("*.distcp"))


@pytest.mark.parametrize(
    "model", [{}, {"precision": "bf16"}, {"prediction": "train"}], ids=["fp32", "bf16", "prediction"]
)
def test_a_checkpoint_is_as_large_as_said(ranks: RankPool, tmp_path: Path, model: dict[str, Any]) -> None:
    from megatron_klong.training.dry_run import checkpoint_bytes

    folder = ReferenceModel("glm-prediction").save(tmp_path / "hf")
    (size,) = ranks.run(save_one, ParallelConfig(), 1, folder=folder, out=tmp_path / "out", model=model)
    said = checkpoint_bytes(
        load_hf_config(folder),
        ModelConfig.model_validate({"hf_config": folder, "precision": "fp32", **model}),
    )
    # What is over is the files' own: about 2 kB for each of some hundreds of tensors.
    assert 0 < size - said < 3000 * 300


def test_the_text_names_every_phase_and_source(domain_store: Path, tmp_path: Path) -> None:
    command = [*arguments(domain_store, tmp_path / "run"), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    said = done.stdout.splitlines()
    assert [line.split()[0] for line in said] == [
        "model", "layout", "pipeline", "pipeline", "source", "phase", "step", "checkpoint",
    ]  # fmt: skip
    assert "phase       train: steps 1 to 4, about " in done.stdout


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.warmup_steps=4", "optimizer.warmup_steps=4 must be below the run's 4 optimizer steps"),
        ("parallel.pipeline=5", "parallel.pipeline=5 exceeds the model's num_hidden_layers=4"),
        (f"{STORE}=/nowhere/x", "no readable header x.json"),
    ],
)
def test_what_would_stop_the_run_stops_the_dry_run(
    domain_store: Path, tmp_path: Path, override: str, message: str
) -> None:
    command = [*arguments(domain_store, tmp_path / "run", override), "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
