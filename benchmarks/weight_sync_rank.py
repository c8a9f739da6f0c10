"""One rank of the weight sync benchmark: ``python -m benchmarks.weight_sync_rank JOB.json``."""

from __future__ import annotations

import os
import re
import signal
import sys
from pathlib import Path

from megatron_klong.config import ParallelConfig, StrictModel
from megatron_klong.inference.server import marked_processes
from megatron_klong.platform import quiet_imports
from megatron_klong.platform.lifetime import die_with_parent


class Job(StrictModel):
    """What the ranks are told."""

    model: Path
    parallel: ParallelConfig
    url: str
    mark: str
    syncs: int
    chunk_bytes: int
    result: Path


class Measured(StrictModel):
    """Of every sync but the first, which also builds the connection; memory in bytes."""

    bytes: int
    tensors: int
    chunk_bytes: int
    send_seconds: list[float]
    total_seconds: list[float]
    sender_extra: list[int]
    worker_extra: list[int]
    differences: list[float]
    largest_megatron: int = 0
    largest_vllm: int = 0


class PeakMemory:
    """How far a process's resident memory rises above where it stood at the start."""

    def __init__(self, pid: int) -> None:
        self._status = Path(f"/proc/{pid}/status")
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak starts anew
        self._start = self._read("VmRSS")

    def extra(self) -> int:
        """Bytes above the start, at most, since then."""
        return self._read("VmHWM") - self._start

    def _read(self, name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", self._status.read_text())
        assert found is not None
        return int(found[1]) * 1024


def main(file: Path) -> None:
    quiet_imports()
    import torch

    from megatron_klong.checks.reference import random_prompts
    from megatron_klong.checks.trainer import RandomTokens
    from megatron_klong.inference.fleet import Fleet
    from megatron_klong.inference.sync import Probe, WeightSync
    from megatron_klong.inference.transfers import trainer_init_info
    from megatron_klong.inference.weight_source import MegatronWeightSource
    from megatron_klong.training.initialize import distributed
    from megatron_klong.training.score import score_tokens

    job = Job.model_validate_json(file.read_text())
    with distributed(job.parallel, seed=1) as platform:
        rank = torch.distributed.get_rank()
        model = RandomTokens(platform, job.model, job.parallel, "fp32", 128)
        fleet = Fleet([job.url]) if rank == 0 else None
        source = MegatronWeightSource(model.trainer.model, model.hf)
        sync = WeightSync(source, trainer_init_info("shm", rank, fleet, source, job.chunk_bytes), fleet, 1e-4)
        prompts = random_prompts(model.hf.vocab_size, 128)
        reports, sender, worker = [], [], []
        for number in range(1 + job.syncs):
            model.step()
            probes = [Probe(ids, given) for ids, given in zip(prompts, score_tokens(model.trainer, prompts))]
            peaks = [PeakMemory(pid) for pid in (os.getpid(), _worker(job.mark))] if rank == 0 else []
            reports.append(sync.run(f"w{number}", probes))
            if peaks:
                sender.append(peaks[0].extra())
                worker.append(peaks[1].extra())
        if rank == 0:
            kept = reports[1:]
            measured = Measured(
                bytes=kept[0].bytes, tensors=kept[0].tensors, chunk_bytes=job.chunk_bytes,
                send_seconds=[report.seconds["send"] for report in kept],
                total_seconds=[sum(report.seconds.values()) for report in kept],
                sender_extra=sender[1:], worker_extra=worker[1:],
                differences=[report.difference for report in kept],
            )  # fmt: skip
            job.result.write_text(measured.model_dump_json())


def _worker(mark: str) -> int:
    """Pid of the server's process that holds the model."""
    names = {pid: Path(f"/proc/{pid}/comm").read_text() for pid in marked_processes(mark)}
    return next(pid for pid, name in names.items() if "Worker" in name)


if __name__ == "__main__":
    die_with_parent(int(os.environ["KLONG_LAUNCHER"]), signal.SIGTERM)
    main(Path(sys.argv[1]))
