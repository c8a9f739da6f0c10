"""``klong sync-check`` and ``klong gpu-check``, as a person starts them."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_klong.checks import gpu
from megatron_klong.checks.gpu import Machine, Row, gpu_check, why_not
from megatron_klong.checks.tiny import write_tiny_model
from megatron_klong.inference.agreement import differences, largest

pytestmark = pytest.mark.timeout(400)


def klong(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_klong.cli", *arguments], capture_output=True, text=True, check=False
    )


def test_sync_check_compares_three_implementations_and_syncs(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "fp32")
    done = klong(
        "sync-check", str(model), "--pipeline", "2", "--syncs", "2", "--out", str(tmp_path / "out"), "--json"
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["parity"]) == 4
    for prompt in result["parity"]:
        assert prompt["megatron_transformers"] < 1e-4
        assert prompt["megatron_vllm"] < 1e-4
    assert [sync["version"] for sync in result["syncs"]] == ["step-1", "step-2"]
    assert all(sync["difference"] < 1e-4 for sync in result["syncs"])
    assert result["moved"] > 1e-2
    assert {"server.log", "result.json", "ranks"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_sync_check_refuses_before_it_starts_anything(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "fp32")
    for arguments, message in (
        ([str(tmp_path)], "no config.json"),
        ([str(model), "--tensor", "8", "--expert", "8"], "parallel.tensor=8 does not divide"),
        ([str(model), "--precision", "fp8"], "precision='fp8'"),
        ([str(model), "--transfer", "nccl"], "server.transfer=nccl needs a GPU"),
    ):
        done = klong("sync-check", *arguments)
        assert done.returncode == 2
        assert message in done.stderr.splitlines()[-1]


def test_the_table_has_passed_failed_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (
        Row("parity-fp32", "works here", ("torch", "transformers")),
        Row("no-such-row", "fails", ("torch",)),
        Row("step-fp32", "lacks a package", ("torch", "no_such_package.inside")),
        Row("step-bf16", "lacks GPUs", ("torch",), gpus=99),
    )
    monkeypatch.setattr(gpu, "ROWS", rows)
    seen: list[str] = []
    result = gpu_check(tmp_path / "out", lambda outcome: seen.append(outcome.title))
    assert seen == ["works here", "fails", "lacks a package", "lacks GPUs"]
    works, fails, package, gpus = result.rows
    assert (works.status, works.detail[:18]) == ("passed", "largest difference")
    assert fails.status == "failed"
    assert "KeyError: 'no-such-row'" in fails.detail
    assert (package.status, package.detail) == ("not run", "no_such_package is not installed")
    assert (gpus.status, gpus.detail) == ("not run", "needs 99 GPUs, found 0")
    assert json.loads((tmp_path / "out" / "gpu-check.json").read_text()) == result.model_dump(mode="json")
    assert result.machine.packages["torch"] == torch.__version__


def test_every_row_says_what_it_needs() -> None:
    for row in gpu.ROWS:
        assert why_not(row, Machine(gpus=["a", "b"], packages={})) in (
            None, "transformer_engine is not installed", "apex is not installed",
        )  # fmt: skip
    needing = [row.name for row in gpu.ROWS if row.gpus]
    assert needing == ["sync-ipc", "sync-nccl", "transformer-engine", "apex"]


def test_a_wrong_weight_fails_the_parity_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row's comparison would notice: it is given log-probs of two models that differ in one tensor.

    Both are by transformers here; Megatron's side runs for real in the table's test above.
    """
    from megatron_klong.checks import gpu_row, reference

    def other_weights(folder: Path, precision: str, prompts: list[tuple[int, ...]]) -> object:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        known = real(folder, "fp32", prompts)
        tensors["model.layers.1.mlp.shared_experts.up_proj.weight"] += 0.1
        save_file(tensors, file)
        return known

    real = reference.reference_log_probs
    monkeypatch.setattr(reference, "reference_log_probs", other_weights)
    monkeypatch.setattr(gpu_row, "_alone", lambda *_: ("here", real(tmp_path / "model", "fp32", prompts)))
    prompts = reference.random_prompts(1024, gpu_row.PROMPT_TOKENS)
    with pytest.raises(AssertionError, match="log-probs differ by"):
        gpu_row._parity("fp32", tmp_path)


def test_a_nan_is_never_the_smaller_difference() -> None:
    assert math.isnan(largest(differences([-1.0, math.nan, -3.0], [-1.0, -2.0, -3.5])))
    assert largest(differences([-0.5, -20.0], [-0.9, -21.0])) == pytest.approx(0.4)
    assert differences([-20.0], [-21.0]) == [pytest.approx(1 / 21)]
