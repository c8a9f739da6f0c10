"""One row of ``klong gpu-check``: ``python -m megatron_klong.checks.gpu_row NAME FOLDER``.

Prints what it found as a JSON string on its last line; anything else is an error.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

from megatron_klong.inference.agreement import differences, largest
from megatron_klong.platform import Platform, import_megatron
from megatron_klong.platform.lifetime import die_with_parent

Precision = Literal["fp32", "bf16"]
STEPS = 8
ROW_TOKENS = 1024
PROMPT_TOKENS = 256
Found = TypeVar("Found")


def main(name: str, folder: Path) -> str:
    """Run a row; what it found.

    Raises:
        Exception: anything, when the row fails; the last line of the traceback says what.
    """
    import_megatron()
    kind, _, which = name.partition("-")
    if kind == "sync":
        return _sync(which, folder)  # type: ignore[arg-type]
    if kind == "parity":
        return _parity(which, folder)  # type: ignore[arg-type]
    if kind in ("step", "offload", "checkpoint"):
        check = {"step": _step, "offload": _offload, "checkpoint": _checkpoint}[kind]
        return _alone(partial(check, which, folder), folder)  # type: ignore[arg-type]
    return {"transformer-engine": _transformer_engine, "apex": _apex}[name]()


def _sync(transfer: Literal["shm", "ipc", "nccl"], folder: Path) -> str:
    from megatron_klong.checks.sync import SyncCheck, check_sync
    from megatron_klong.checks.tiny import write_tiny_model

    model = write_tiny_model(folder / "model", "bf16" if transfer != "shm" else "fp32")
    check = SyncCheck(
        model=model, precision="bf16" if transfer != "shm" else "fp32", transfer=transfer,
        server_devices=_second_gpu() if transfer == "nccl" else None,
    )  # fmt: skip
    result = check_sync(check, folder)
    sending = [sync.seconds["send"] for sync in result.syncs]
    return (
        f"parity {max(prompt.megatron_vllm for prompt in result.parity):.1e}, {len(result.syncs)} syncs of "
        f"{result.syncs[0].bytes / 1e6:.1f} MB, {min(sending):.2f} s each, probes within "
        f"{max(sync.difference for sync in result.syncs):.1e} (tolerance {result.tolerance:g})"
    )


def _second_gpu() -> str:
    """The second of the GPUs that this process may see; the trainer is on the first."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[1] if visible else "1"


def _parity(precision: Precision, folder: Path) -> str:
    from megatron_klong.checks.reference import random_prompts, reference_log_probs
    from megatron_klong.checks.sync import TOLERANCE
    from megatron_klong.checks.tiny import tiny_shape, write_tiny_model

    weights = write_tiny_model(folder / "model", precision)
    prompts = random_prompts(int(str(tiny_shape()["vocab_size"])), PROMPT_TOKENS)
    theirs = reference_log_probs(weights, precision, prompts)
    assert theirs is not None

    def ours(platform: Platform) -> tuple[str, list[tuple[float, ...]]]:
        from megatron_klong.checks.trainer import RandomTokens
        from megatron_klong.config import ParallelConfig
        from megatron_klong.training.score import score_tokens

        model = RandomTokens(platform, weights, ParallelConfig(), precision, PROMPT_TOKENS)
        return platform.name, score_tokens(model.trainer, prompts)

    name, given = _alone(ours, folder)
    worst = largest([largest(differences(mine, known)) for mine, known in zip(given, theirs, strict=True)])
    if not worst <= TOLERANCE[precision]:
        raise AssertionError(f"log-probs differ by {worst:.3g} (tolerance {TOLERANCE[precision]:g})")
    return f"largest difference {worst:.1e} (tolerance {TOLERANCE[precision]:g}) on {name}"


def _step(precision: Precision, folder: Path, platform: Platform) -> str:
    import torch

    from megatron_klong.checks.tiny import write_tiny_model
    from megatron_klong.checks.trainer import RandomTokens
    from megatron_klong.config import ParallelConfig

    weights = write_tiny_model(folder / "model", precision)
    model = RandomTokens(platform, weights, ParallelConfig(), precision, ROW_TOKENS)
    results = [model.step() for _ in range(2)]
    start = time.perf_counter()
    results += [model.step() for _ in range(STEPS)]
    seconds = time.perf_counter() - start
    on_gpu = platform.device.type == "cuda"
    memory = f", {torch.cuda.max_memory_allocated() / 1e9:.2f} GB at most" if on_gpu else ""
    return (
        f"{STEPS * ROW_TOKENS / seconds:,.0f} tokens/s on {platform.name}, loss {results[0].loss:.3f} -> "
        f"{results[-1].loss:.3f}{memory}"
    )


def _offload(precision: Precision, folder: Path, platform: Platform) -> str:
    import torch

    from megatron_klong.checks.tiny import write_tiny_model
    from megatron_klong.checks.trainer import RandomTokens
    from megatron_klong.config import ParallelConfig

    weights = write_tiny_model(folder / "model", precision)
    ends = []
    for offload in (False, True):
        model = RandomTokens(
            platform, weights, ParallelConfig(), precision, ROW_TOKENS, offload=offload, deterministic=True
        )
        losses = [model.step().loss for _ in range(STEPS)]
        ends.append((losses, [each.detach().clone() for each in model.trainer.model.parameters()]))
    (kept, kept_weights), (moved, moved_weights) = ends
    same = all(torch.equal(a, b) for a, b in zip(kept_weights, moved_weights, strict=True))
    if kept != moved or not same:
        raise AssertionError(
            f"losses {kept} and, with moments in host memory, {moved}; weights equal: {same}"
        )
    return f"{STEPS} steps on {platform.name}, loss {kept[0]:.3f} -> {kept[-1]:.3f} with both"


def _checkpoint(precision: Precision, folder: Path, platform: Platform) -> str:
    from megatron_klong.checks.tiny import write_tiny_model
    from megatron_klong.checks.trainer import RandomTokens
    from megatron_klong.config import ParallelConfig
    from megatron_klong.training.checkpointing import load_checkpoint, save_checkpoint
    from megatron_klong.training.sft import SftProgress

    weights = write_tiny_model(folder / "model", precision)
    model = RandomTokens(platform, weights, ParallelConfig(), precision, ROW_TOKENS, deterministic=True)
    for _ in range(2):
        model.step()
    start = time.perf_counter()
    saved = save_checkpoint(model.trainer, SftProgress(2), folder / "checkpoints", keep_last=1)
    seconds = time.perf_counter() - start
    went_on = [model.step().loss for _ in range(3)]
    model.restart(load_checkpoint(model.trainer, saved, SftProgress).step)
    again = [model.step().loss for _ in range(3)]
    if went_on != again:
        raise AssertionError(f"losses {went_on}, and {again} from the checkpoint")
    size = sum(file.stat().st_size for file in saved.iterdir())
    return f"{size / 1e6:.1f} MB written in {seconds:.2f} s on {platform.name}, losses go on as they did"


def _alone(check: Callable[[Platform], Found], folder: Path) -> Found:
    """Run a check as the only rank."""
    from megatron_klong.config import ParallelConfig
    from megatron_klong.training.initialize import distributed

    meeting = folder / "rendezvous"
    meeting.unlink(missing_ok=True)
    with distributed(
        ParallelConfig(), seed=1, init_method=f"file://{meeting}", rank=0, world_size=1
    ) as platform:
        return check(platform)


def _transformer_engine() -> str:
    import torch
    import transformer_engine.pytorch as te

    layer = te.Linear(256, 256, params_dtype=torch.bfloat16, device="cuda")
    layer(torch.randn(8, 256, dtype=torch.bfloat16, device="cuda")).sum().backward()
    assert layer.weight.grad is not None and torch.isfinite(layer.weight.grad).all()
    return "gradients are finite"


def _apex() -> str:
    import torch
    from apex.optimizers import FusedAdam

    weight = torch.nn.Parameter(torch.ones(64, device="cuda"))
    weight.grad = torch.ones_like(weight)
    FusedAdam([weight], lr=0.1, adam_w_mode=True).step()
    assert torch.allclose(weight, torch.full_like(weight, 0.9), atol=2e-3)
    return "the step is Adam's"


if __name__ == "__main__":
    die_with_parent(int(os.environ["KLONG_LAUNCHER"]), signal.SIGTERM)
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]))))
