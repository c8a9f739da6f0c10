"""A training step on Megatron-Core beside the same step in transformers: tokens per second, and by operation.

    python -m benchmarks.train_step --out DIR [--preset NAME] [--samples N] [--tokens N] [--steps N]

Both have the same weights (fp32, from a seed), rows of random tokens and AdamW, torch's or Megatron's;
each runs in a process of its own, with all cores, and says its losses: that they agree shows that it is the
same work. The samples are one batch in transformers and one packed row in Megatron.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

LEARNING_RATE = 1e-3
WARM_UP = 2


@dataclass(frozen=True)
class Work:
    """What is computed."""

    model: Path
    samples: int
    tokens: int
    steps: int


@dataclass(frozen=True)
class Result:
    """Of one implementation.

    Attributes:
        losses: of each step, before its update.
        seconds: of a step, median after the first ones.
        operations: the ones that took most, with their share of the time.
    """

    losses: list[float]
    seconds: float
    operations: list[tuple[str, float]]


def main() -> int:
    """Run both, print a table, write ``train-step.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="tiny-glm-4.5")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", choices=("megatron", "transformers"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    work = Work(arguments.out / "model", arguments.samples, arguments.tokens, arguments.steps)
    if arguments.only:
        result = {"megatron": by_megatron, "transformers": by_transformers}[arguments.only](work)
        (arguments.out / f"{arguments.only}.json").write_text(json.dumps(asdict(result)))
        return 0
    write_model(arguments.preset, work.model)
    results: dict[str, Result] = {}
    for name in ("transformers", "megatron"):
        command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--only", name]
        subprocess.run(command, check=True)
        results[name] = Result(**json.loads((arguments.out / f"{name}.json").read_text()))
    report(work, results)
    (arguments.out / "train-step.json").write_text(
        json.dumps({name: asdict(result) for name, result in results.items()}, indent=1)
    )
    return 0


def report(work: Work, results: dict[str, Result]) -> None:
    """The table."""
    tokens = work.samples * work.tokens
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; {work.samples} samples of {work.tokens} tokens, fp32"
    )
    for name, result in results.items():
        print(f"{name}: {result.seconds:.3f} s a step, {tokens / result.seconds:,.0f} tokens/s")
        shares = ", ".join(f"{operation} {share:.0%}" for operation, share in result.operations)
        print(f"  {shares}")
    ratio = results["transformers"].seconds / results["megatron"].seconds
    apart = max(abs(a - b) / b for a, b in zip(results["megatron"].losses, results["transformers"].losses))
    print(f"Megatron-Core has {ratio:.2f} times the speed; losses differ by up to {apart:.1e}, relatively")


def write_model(preset: str, folder: Path) -> None:
    """Weights from a seed; without prediction layers, which transformers does not train."""
    from megatron_klong.checks.tiny import write_tiny_model

    if not folder.is_dir():
        write_tiny_model(folder, "fp32", preset)


def batch(vocabulary: int, work: Work) -> np.ndarray:
    """Random tokens ``[samples, tokens]``."""
    return np.random.default_rng(0).integers(0, vocabulary, (work.samples, work.tokens))


def timed(step: Callable[[], float], steps: int) -> Result:
    """Take the steps, and one more under torch's profiler."""
    from torch.profiler import ProfilerActivity, profile

    losses, seconds = [], []
    for _ in range(steps):
        start = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - start)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step()
    events = sorted(profiled.key_averages(), key=lambda each: -each.self_cpu_time_total)
    whole = sum(each.self_cpu_time_total for each in events)
    most = [(each.key.removeprefix("aten::"), each.self_cpu_time_total / whole) for each in events[:8]]
    return Result(losses, statistics.median(seconds[WARM_UP:]), most)


def by_transformers(work: Work) -> Result:
    """The published implementation with torch's optimizer."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=torch.float32)
    model.train()
    decays = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-8)
    tokens = torch.from_numpy(batch(model.config.vocab_size, work))

    def step() -> float:
        optimizer.zero_grad()
        logits = model(tokens).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return timed(step, work.steps)


def by_megatron(work: Work) -> Result:
    """Ours, on one rank."""
    from megatron_klong.config import ParallelConfig
    from megatron_klong.platform import quiet_imports

    quiet_imports()
    from megatron_klong.training.initialize import distributed

    with tempfile.TemporaryDirectory() as meeting:
        at = f"file://{meeting}/rendezvous"
        with distributed(ParallelConfig(), seed=1, init_method=at, rank=0, world_size=1) as here:
            return _on_one_rank(work, here)


def _on_one_rank(work: Work, here: object) -> Result:
    from megatron_klong.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainerSettings
    from megatron_klong.data.rows import PackedRow, fill_row
    from megatron_klong.data.windows import TrainingSample
    from megatron_klong.model.hf_config import load_hf_config
    from megatron_klong.training.losses import sft_objective
    from megatron_klong.training.step import train_step
    from megatron_klong.training.trainer import build_trainer

    hf = load_hf_config(work.model)
    settings = TrainerSettings(
        model=ModelConfig(hf_config=work.model, weights=work.model, precision="fp32"),
        parallel=ParallelConfig(), row_tokens=work.samples * work.tokens, steps=1_000, seed=1,
        optimizer=OptimizerConfig(lr=LEARNING_RATE, schedule="constant"),
    )  # fmt: skip
    trainer = build_trainer(settings, hf, here)  # type: ignore[arg-type]
    every = np.ones(work.tokens, dtype=bool)
    samples = [TrainingSample(ids, every, 0, number) for number, ids in enumerate(batch(hf.vocab_size, work))]
    rows: Sequence[PackedRow] = [fill_row(samples, work.samples * work.tokens)]
    return timed(lambda: train_step(trainer, rows, sft_objective).loss, work.steps)


if __name__ == "__main__":
    sys.exit(main())
