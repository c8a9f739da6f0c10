"""Who may start in a run directory, and what happens to what is in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_klong.config import SftConfig, load_config
from megatron_klong.data.header import read_header
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.training.preflight import CheckedInputs
from megatron_klong.training.run_directory import RunDirectory, sft_identity

ROOT = Path(__file__).parents[1]


@pytest.fixture
def inputs(domain_store: Path) -> CheckedInputs:
    return CheckedInputs(
        load_hf_config(ROOT / "examples/quickstart/model"), {"replication": read_header(domain_store)}
    )


def config(*overrides: str) -> SftConfig:
    return load_config(SftConfig, ROOT / "examples/quickstart/sft.yaml", overrides)


def prepare(run: RunDirectory, settings: SftConfig, inputs: CheckedInputs, *, fresh: bool) -> None:
    run.prepare(settings, sft_identity(settings, inputs), fresh=fresh)


def trained(run: RunDirectory) -> None:
    """What a run leaves that trained."""
    run.metrics.write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    (run.checkpoints / "step_00000100").mkdir(parents=True)


def test_the_same_run_may_start_again_at_another_layout(tmp_path: Path, inputs: CheckedInputs) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config(), inputs, fresh=False)
    trained(run)
    prepare(run, config("parallel.nproc=8", "log.every=1", "optimizer.offload=true"), inputs, fresh=False)
    assert "nproc: 8" in run.config.read_text()


def test_another_run_is_refused_once_something_was_trained(tmp_path: Path, inputs: CheckedInputs) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config("run.seed=1"), inputs, fresh=False)
    prepare(run, config("run.seed=2"), inputs, fresh=False)  # a corrected start
    trained(run)
    with pytest.raises(ValueError, match=r"other settings: run\.seed \(run\.seed was 2, now 3\)"):
        prepare(run, config("run.seed=3"), inputs, fresh=False)
    assert "seed: 2" in run.config.read_text()


def test_fresh_deletes_the_run_and_nothing_else(tmp_path: Path, inputs: CheckedInputs) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config("run.seed=1"), inputs, fresh=False)
    trained(run)
    (tmp_path / "notes.txt").write_text("mine")
    prepare(run, config("run.seed=2"), inputs, fresh=True)
    assert not run.checkpoints.exists()
    assert not run.metrics.exists()
    assert "seed: 2" in run.config.read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def start() -> None:
        with RunDirectory(tmp_path).locked():
            pass

    with (
        RunDirectory(tmp_path).locked(),
        pytest.raises(ValueError, match=r"another process is running in it \(run\)"),
    ):
        start()
    start()


def test_metrics_are_cut_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = [f'{{"step": {step}}}\n' for step in (0, 1, 2, 3)]
    run.metrics.write_text("".join(lines) + '{"step": 4')
    run.truncate_metrics(2)
    assert run.metrics.read_text() == "".join(lines[:3])
    run.truncate_metrics(-1)
    assert run.metrics.read_text() == ""
