"""Does a model leave Megatron unharmed? Parity of three implementations, then syncs into a running server."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_klong.config import ParallelConfig, ServerConfig, StrictModel, TransferBackend
from megatron_klong.inference.server import VllmServer
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.layout import check_layout
from megatron_klong.training.local_ranks import run_ranks

TOLERANCE = {"fp32": 1e-4, "bf16": 0.15}
"""Largest difference that passes, as `inference.agreement` counts; of bf16, what rounding did to a tiny
model of 4 layers."""


class SyncCheck(StrictModel):
    """What is checked."""

    model: Path
    """Hugging Face folder with weights."""

    parallel: ParallelConfig = ParallelConfig()
    """Layout of the Megatron ranks."""

    precision: Literal["fp32", "bf16"] = "fp32"
    """Of Megatron and of the server."""

    transfer: TransferBackend = "shm"
    """How the weights travel."""

    syncs: int = Field(default=3, ge=0)
    """Optimizer steps, each followed by a sync."""

    prompt_tokens: int = Field(default=128, ge=8)
    """Length of the longest probe; others are shorter."""

    server_devices: str | None = None
    """GPUs of the server, as in CUDA_VISIBLE_DEVICES."""

    chunk_bytes: int = Field(default=64 << 20, gt=0)
    """Shared memory of one chunk, for `shm`."""


class PromptParity(StrictModel):
    """Largest differences of log-probs of one prompt, as `inference.agreement` counts them.

    None where an implementation was not run.
    """

    tokens: int
    megatron_transformers: float | None
    megatron_vllm: float
    vllm_transformers: float | None


class SyncOutcome(StrictModel):
    """One sync; see :class:`megatron_klong.inference.sync.SyncReport`."""

    version: str
    difference: float
    tensors: int
    bytes: int
    seconds: dict[str, float]


class SyncCheckResult(StrictModel):
    """What came out.

    Attributes:
        check: what was checked.
        tolerance: for every log-prob.
        parity: by prompt, before the first step.
        syncs: in order.
        moved: how far a step moved the probes' log-probs, at least. A sync that did nothing would show
            this difference; where it is within the tolerance, such a sync could pass.
    """

    check: SyncCheck
    tolerance: float
    parity: list[PromptParity]
    syncs: list[SyncOutcome]
    moved: float


class SyncJob(StrictModel):
    """What the ranks are told."""

    check: SyncCheck
    url: str
    prompts: list[tuple[int, ...]]
    transformers: list[list[float]] | None
    result: Path


def check_sync(
    check: SyncCheck, folder: Path | None = None, on_wait: Callable[[], None] = lambda: None
) -> SyncCheckResult:
    """Start a server and Megatron ranks on the same weights, compare, train, sync, compare again.

    Args:
        check: what to check.
        folder: keeps the logs and the result; a temporary folder where none is named.
        on_wait: called while the server starts.

    Raises:
        ValueError: model or layout do not fit; or numbers do not agree, or a rank died, and the ranks
            have said so on stderr.
        ServerError: the server died.
    """
    from megatron_klong.checks.reference import random_prompts, reference_log_probs  # torch: seconds

    hf = load_hf_config(check.model)
    check_layout(hf, check.parallel)
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="klong-sync-check-") as temporary:
            return check_sync(check, Path(temporary), on_wait)
    folder.mkdir(parents=True, exist_ok=True)
    config = ServerConfig(
        model=check.model, dtype="float32" if check.precision == "fp32" else "bfloat16",
        max_model_len=2 * check.prompt_tokens, max_num_seqs=8, transfer=check.transfer,
        devices=check.server_devices, gpu_memory_utilization=0.3,
    )  # fmt: skip
    server = VllmServer(config, folder / "server.log")
    server.start()
    try:
        prompts = random_prompts(hf.vocab_size, check.prompt_tokens)
        known = reference_log_probs(check.model, check.precision, prompts)
        server.wait_ready(on_wait)
        job = SyncJob(
            check=check, url=server.url, prompts=prompts, transformers=known,
            result=folder / "result.json",
        )  # fmt: skip
        job.result.unlink(missing_ok=True)
        (folder / "job.json").write_text(job.model_dump_json(indent=1))
        code = run_ranks(
            "megatron_klong.checks.sync_worker", [str(folder / "job.json")],
            check.parallel.world_size, folder / "ranks",
        )  # fmt: skip
        if code:
            raise ValueError(f"the sync check of {check.model} did not pass (above); its logs: {folder}")
        return SyncCheckResult.model_validate_json(job.result.read_text())
    finally:
        server.stop()
