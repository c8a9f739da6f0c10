"""Who may start in a run directory, and what happens to what is in it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_klong.config import SftConfig, load_config
from megatron_klong.data.header import read_header
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.training.preflight import CheckedInputs, check_sft
from megatron_klong.training.run_directory import RunDirectory, sft_identity

ROOT = Path(__file__).parents[1]
Configs = Callable[..., SftConfig]


@pytest.fixture
def inputs(domain_store: Path) -> CheckedInputs:
    return CheckedInputs(
        load_hf_config(ROOT / "examples/quickstart/model"), {"replication": read_header(domain_store)}
    )


@pytest.fixture
def config(domain_store: Path) -> Configs:
    """The quickstart's config on the test's data."""

    def load(*overrides: str) -> SftConfig:
        store = f"data.sources.replication.store={domain_store}"
        return load_config(SftConfig, ROOT / "examples/quickstart/sft.yaml", [store, *overrides])

    return load


def prepare(run: RunDirectory, settings: SftConfig, inputs: CheckedInputs, *, fresh: bool) -> None:
    run.prepare(settings, sft_identity(settings, inputs, run), fresh=fresh)


def trained(run: RunDirectory) -> None:
    """What a run leaves that trained."""
    run.metrics.write_text('{"kind": "train", "step": 1, "loss": 1.0}\n')
    (run.checkpoints / "step_00000100").mkdir(parents=True)


def test_the_same_run_may_start_again_at_another_layout(
    tmp_path: Path, inputs: CheckedInputs, config: Configs
) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config(), inputs, fresh=False)
    trained(run)
    prepare(run, config("parallel.nproc=8", "log.every=1", "optimizer.offload=true"), inputs, fresh=False)
    assert "nproc: 8" in run.config.read_text()


def test_another_run_is_refused_once_something_was_trained(
    tmp_path: Path, inputs: CheckedInputs, config: Configs
) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config("run.seed=1"), inputs, fresh=False)
    prepare(run, config("run.seed=2"), inputs, fresh=False)  # a corrected start
    trained(run)
    with pytest.raises(ValueError, match=r"other settings: run\.seed \(run\.seed was 2, now 3\)"):
        prepare(run, config("run.seed=3"), inputs, fresh=False)
    assert "seed: 2" in run.config.read_text()


def test_first_weights_that_are_gone_stop_no_run_that_goes_on(
    tmp_path: Path, inputs: CheckedInputs, config: Configs
) -> None:
    """Of a run with checkpoints; other weights in their place are still refused."""
    weights, run = tmp_path / "weights", RunDirectory(tmp_path / "run")
    weights.mkdir()
    run.path.mkdir()
    (weights / "model.safetensors").write_bytes(b"first")
    settings = config(f"model.weights={weights}")
    prepare(run, settings, inputs, fresh=False)
    trained(run)
    (weights / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has neither \*\.safetensors nor"):
        check_sft(settings)
    assert run.has_checkpoints() and check_sft(settings, resumes=True).model == inputs.model
    prepare(run, settings, inputs, fresh=False)
    (weights / "model.safetensors").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"other settings: model\.weights\.content"):
        prepare(run, settings, inputs, fresh=False)


def test_fresh_deletes_the_run_and_nothing_else(
    tmp_path: Path, inputs: CheckedInputs, config: Configs
) -> None:
    run = RunDirectory(tmp_path)
    prepare(run, config("run.seed=1"), inputs, fresh=False)
    trained(run)
    (tmp_path / "notes.txt").write_text("mine")
    prepare(run, config("run.seed=2"), inputs, fresh=True)
    assert not run.checkpoints.exists()
    assert not run.metrics.exists()
    assert "seed: 2" in run.config.read_text()
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_fresh_is_done_once_for_a_job(
    tmp_path: Path,
    inputs: CheckedInputs,
    config: Configs,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A job that is queued again brings the same command, which must not delete what its first start did."""
    run, job = RunDirectory(tmp_path), {"SLURM_JOB_ID": "7"}
    prepare(run, config(), inputs, fresh=False)
    trained(run)
    # Queued again before the command had begun, in another job, or by hand: it is done.
    assert run.may_be_deleted(job) and run.may_be_deleted({**job, "SLURM_RESTART_COUNT": "1"})
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    prepare(run, config(), inputs, fresh=True)
    trained(run)
    assert run.may_be_deleted(job) and run.may_be_deleted({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "1"})
    assert not run.may_be_deleted({**job, "SLURM_RESTART_COUNT": "1"})
    assert "--fresh was done when this job began" in capfd.readouterr().err
    # A job that began in an empty directory, where there was nothing to delete.
    empty = RunDirectory(tmp_path / "empty")
    empty.path.mkdir()
    prepare(empty, config(), inputs, fresh=True)
    assert not empty.may_be_deleted({**job, "SLURM_RESTART_COUNT": "1"})
    with pytest.raises(ValueError, match="delete the run at each of torchrun's --max-restarts"):
        run.may_be_deleted({"TORCHELASTIC_MAX_RESTARTS": "3"})


def test_one_process_at_a_time(tmp_path: Path) -> None:
    def start() -> None:
        with RunDirectory(tmp_path).locked():
            pass

    with (
        RunDirectory(tmp_path).locked(),
        pytest.raises(
            ValueError, match=rf"another process is running in it \(run: process {os.getpid()} on [^)]+\)"
        ),
    ):
        start()
    start()


def test_metrics_are_cut_after_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    lines = [f'{{"kind": "train", "step": {step}}}\n' for step in (1, 2, 3)]
    held_out = [f'{{"kind": "validation", "step": {step}, "source": "chat"}}\n' for step in (0, 2)]
    run.metrics.write_text("".join([held_out[0], *lines[:2], held_out[1], lines[2]]) + '{"step": 4')
    assert run.truncate_metrics(2) == {"chat"}  # the held-out losses that need not be computed again
    assert run.metrics.read_text() == "".join([held_out[0], *lines[:2], held_out[1]])
    assert run.truncate_metrics(1) == set()
    assert run.truncate_metrics(-1) == set()
    assert run.metrics.read_text() == ""
