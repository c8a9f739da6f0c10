"""What ranks do in the tests of inference: a trainer that brings its weights to servers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_klong.config import ParallelConfig
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.plugin import register
from megatron_klong.inference.shm_engine import SharedMemoryTrainerInitInfo
from megatron_klong.inference.shm_segment import Segment, Slot
from megatron_klong.inference.sync import Probe, SyncError, SyncReport, WeightSync
from megatron_klong.inference.weight_source import MegatronWeightSource
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import Rule
from megatron_klong.platform import Platform
from megatron_klong.training.losses import sft_objective
from megatron_klong.training.score import score_tokens
from megatron_klong.training.step import train_step
from megatron_klong.training.trainer import Trainer, build_trainer
from tests import reference

FULL = ParallelConfig(tensor=2, pipeline=2, expert=2)
PROMPT_LENGTHS = (2, 33, 60, 64)
VICTIM = "model.layers.2.mlp.experts.5.up_proj.weight"
"""The tensor that faults befall: one expert's, on the second stage."""


def prompts() -> list[tuple[int, ...]]:
    """Random tokens; the longest fill a block of the prefix cache, and share it, as real prompts do."""
    random = np.random.default_rng(0)
    made = [tuple(int(t) for t in random.integers(0, 96, length)) for length in PROMPT_LENGTHS]
    return [*made[:3], made[2][:40] + made[3][40:]]


class FaultySource(MegatronWeightSource):
    """The trainer's weights with something wrong in them."""

    victim = VICTIM
    fault: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]] | None = None
    misgathers = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in super().__iter__():
            if name == self.victim and self.fault is not None and tensor.numel():
                yield from self.fault(name, tensor)
            else:
                yield name, tensor

    def _gather(self, rule: Rule) -> Tensor | None:
        full = super()._gather(rule)
        if self.misgathers and full is not None and VICTIM in [part.name for part in rule.hf]:
            full = full.clone()
            full[3, 5] *= 1.001
        return full


class SyncingTrainer:
    """A trainer and its sync, on every rank."""

    def __init__(
        self, platform: Platform, folder: Path, urls: Sequence[str], precision: str = "fp32",
        tolerance: float = 1e-4, **info: object,
    ) -> None:  # fmt: skip
        hf = load_hf_config(folder)
        config = reference.sft_config(FULL, folder)
        model = config.model.model_copy(update={"precision": precision})
        self.trainer: Trainer = build_trainer(
            reference.trainer_settings(config.model_copy(update={"model": model})), hf, platform
        )
        self.source = FaultySource(self.trainer.model, hf)
        rank = torch.distributed.get_rank()
        register()
        self.fleet = Fleet(urls) if rank == 0 else None
        # Small chunks, so that a sync of the tiny model has many.
        settings = {"chunk_bytes": 1 << 17, "timeout_seconds": 60.0, **info}
        init_info = SharedMemoryTrainerInitInfo(rank=rank, **settings)  # type: ignore[arg-type]
        self.sync = WeightSync(self.source, init_info, self.fleet, tolerance)
        ways = FULL.data(torch.distributed.get_world_size())
        self.rows = reference.packed(reference.batch())[rank % ways :: ways]

    def step(self) -> None:
        """Change the weights a good deal."""
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = 1e-2
        train_step(self.trainer, self.rows, sft_objective)

    def probes(self) -> list[Probe]:
        asked = prompts()
        return [Probe(ids, given) for ids, given in zip(asked, score_tokens(self.trainer, asked))]

    def run(self, version: str) -> SyncReport | str:
        """A sync's report, or what its error says."""
        try:
            return self.sync.run(version, self.probes())
        except SyncError as error:
            return str(error)


def log_probs(platform: Platform, folder: Path, precision: str) -> list[tuple[float, ...]]:
    """The trainer's own, of all prompts."""
    return [probe.log_probs for probe in SyncingTrainer(platform, folder, ["-"], precision).probes()]


def many_syncs(platform: Platform, folder: Path, urls: list[str], count: int) -> list[SyncReport | str]:
    syncing = SyncingTrainer(platform, folder, urls)
    results = []
    for number in range(count):
        syncing.step()
        results.append(syncing.run(f"w{number}"))
    return results


def wrong(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor * 1.05


def missing(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield from ()


def late(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    time.sleep(9)
    yield name, tensor


def twice(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor
    yield name, tensor


def broken(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    raise FloatingPointError("a gather that fails on the sender alone")


def misshapen(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield name, tensor[:-1]


FAULTS = {"wrong": wrong, "missing": missing, "late": late, "twice": twice, "broken": broken,
          "misshapen": misshapen}  # fmt: skip


class CorruptingSegment(Segment):
    """Shared memory in which a byte of the victim changes after it was written."""

    def put(self, name: str, tensor: Tensor, offset: int) -> Slot:
        slot = super().put(name, tensor, offset)
        if name == VICTIM:
            self.bytes[offset + 100] ^= 1
        return slot


def a_fault_and_its_cure(
    platform: Platform, folder: Path, urls: list[str], fault: str, ready: Path, seen: Path
) -> list[SyncReport | str]:
    """A good sync, one with the fault, and a good one again; the same weights sync object throughout.

    After the fault it says so by the file ``ready`` and waits for the file ``seen``.
    """
    syncing = SyncingTrainer(platform, folder, urls, timeout_seconds=8.0 if fault == "late" else 60.0)
    results = [syncing.run("before")]
    syncing.step()
    with _fault(syncing, fault):
        results.append(syncing.run("faulty"))
    ready.touch()
    while not seen.exists():
        time.sleep(0.05)
    results.append(syncing.run("after"))
    return results


class _fault:  # noqa: N801 (used as a function)
    """Puts a fault in place, and takes it away."""

    def __init__(self, syncing: SyncingTrainer, name: str) -> None:
        self._syncing, self._name = syncing, name

    def __enter__(self) -> None:
        from megatron_klong.inference import shm_engine

        if self._name == "corrupted":
            shm_engine.Segment = CorruptingSegment
            self._syncing.sync._engine = None  # new segments, of that kind
        elif self._name == "misgathered":
            self._syncing.source.misgathers = True
        elif self._name == "stale-cache":
            Fleet.reset_prefix_cache, self._kept = lambda _self: None, Fleet.reset_prefix_cache
        elif self._name.startswith("kill-"):
            pid = int(self._name.removeprefix("kill-"))

            def kill(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
                os.kill(pid, signal.SIGKILL)
                yield name, tensor

            self._syncing.source.fault = kill
        elif self._name != "none":
            self._syncing.source.fault = FAULTS[self._name]
        if self._name == "wrong":  # one that every token goes through, so that a probe must see it
            self._syncing.source.victim = "model.layers.2.self_attn.o_proj.weight"

    def __exit__(self, *_: object) -> None:
        from megatron_klong.inference import shm_engine

        shm_engine.Segment = Segment
        self._syncing.source.fault, self._syncing.source.misgathers = None, False
        if self._name == "stale-cache":
            Fleet.reset_prefix_cache = self._kept


def gathered(platform: Platform, folder: Path, parallel: ParallelConfig, everywhere: bool) -> object:
    """Two passes over the source: what this rank gets, with metadata checked against it."""
    hf = load_hf_config(folder)
    trainer = build_trainer(reference.settings(parallel, folder), hf, platform)
    source = MegatronWeightSource(trainer.model, hf, everywhere=everywhere)
    first = {name: tensor.clone() for name, tensor in source}
    meta = source.metadata()
    source.prepare()
    for _ in source:  # compared with what the ranks hold
        pass
    source.drain()  # nothing is left
    assert [each.name for each in meta] == list(first)
    if torch.distributed.get_rank() == 0 or everywhere:
        assert all((t.dtype, tuple(t.shape)) == (m.dtype, m.shape) for t, m in zip(first.values(), meta))
        return first
    return sum(tensor.numel() for tensor in first.values())
