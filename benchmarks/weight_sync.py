"""A sync into a running vLLM server against a memory copy of the same bytes; peak extra memory.

Run from the top of the repository: ``python -m benchmarks.weight_sync [--tensor 2 ...]``. The ranks
that it starts run ``benchmarks.weight_sync_rank``.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.weight_sync_rank import Job, Measured
from megatron_klong.checks.tiny import write_tiny_model
from megatron_klong.config import ParallelConfig, ServerConfig
from megatron_klong.inference.server import VllmServer
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import weight_rules
from megatron_klong.training.local_ranks import run_ranks

SHAPE = {
    "vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 6,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "moe_intermediate_size": 512,
    "n_routed_experts": 16,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1)
    parser.add_argument("--expert", type=int, default=1)
    parser.add_argument("--syncs", type=int, default=4)
    parser.add_argument("--chunk-mb", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/weight_sync.json"))
    arguments = parser.parse_args()
    parallel = ParallelConfig(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert)
    with tempfile.TemporaryDirectory() as temporary:
        measured = measure(Path(temporary), parallel, arguments.syncs, arguments.chunk_mb << 20)
    report = compare(measured, parallel)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(report, indent=1))
    for name, value in report.items():
        print(f"{name:<44} {value}")


def measure(folder: Path, parallel: ParallelConfig, syncs: int, chunk_bytes: int) -> Measured:
    """Serve the model, start the ranks, sync; what they measured."""
    model = write_tiny_model(folder / "model", "fp32", **SHAPE)
    config = ServerConfig(model=model, dtype="float32", max_model_len=256, max_num_seqs=4)
    with VllmServer(config, folder / "server.log") as server:
        job = Job(
            model=model, parallel=parallel, url=server.url, mark=server.mark, syncs=syncs,
            chunk_bytes=chunk_bytes, result=folder / "result.json",
        )  # fmt: skip
        (folder / "job.json").write_text(job.model_dump_json())
        code = run_ranks(
            "benchmarks.weight_sync_rank", [str(folder / "job.json")], parallel.world_size, folder / "ranks"
        )
        if code:
            raise SystemExit(code)
    rules = weight_rules(load_hf_config(model)).values()
    largest = max(torch.Size(rule.shape).numel() * 4 for rule in rules)
    stacks = SHAPE["n_routed_experts"] * 2 * SHAPE["moe_intermediate_size"] * SHAPE["hidden_size"] * 4
    measured = Measured.model_validate_json(job.result.read_text())
    return measured.model_copy(update={"largest_megatron": largest, "largest_vllm": max(largest, stacks)})


def compare(measured: Measured, parallel: ParallelConfig) -> dict[str, str]:
    """Both sides of each ratio."""
    copy = copy_seconds(measured.bytes)
    send, whole = min(measured.send_seconds), min(measured.total_seconds)
    mib = 1 << 20
    return {
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, CPU",
        "layout": f"TP{parallel.tensor} PP{parallel.pipeline} EP{parallel.expert}",
        "bytes": f"{measured.bytes:,} in {measured.tensors} tensors, fp32",
        "memory copy": f"{copy:.3f} s, {measured.bytes / copy / 1e9:.2f} GB/s",
        "sync, sending": f"{send:.3f} s, {measured.bytes / send / 1e9:.2f} GB/s = "
        f"{send / copy:.1f} x the copy",
        "sync, whole (pause, reset, probe)": f"{whole:.3f} s = {whole / copy:.1f} x the copy",
        "largest fused tensor, Megatron": f"{measured.largest_megatron / mib:.0f} MiB",
        "largest fused tensor, vLLM": f"{measured.largest_vllm / mib:.0f} MiB (all experts of a layer)",
        "chunks in shared memory": f"2 x {measured.chunk_bytes / mib:.0f} MiB",
        "peak extra memory of the sender": f"{max(measured.sender_extra) / mib:.0f} MiB = "
        f"{max(measured.sender_extra) / measured.largest_megatron:.2f} x the largest fused tensor",
        "peak extra memory of vLLM's worker": f"{max(measured.worker_extra) / mib:.0f} MiB = "
        f"{max(measured.worker_extra) / measured.largest_vllm:.2f} x the largest fused tensor",
        "largest difference of a probe": f"{max(measured.differences):.1e}",
    }


def copy_seconds(size: int) -> float:
    """Best of five copies of as many bytes, one thread, all pages touched before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    source, target = torch.ones(size, dtype=torch.uint8), torch.zeros(size, dtype=torch.uint8)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return best


if __name__ == "__main__":
    main()
