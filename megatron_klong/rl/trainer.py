"""The trainer's loop of a reinforcement learning run: batches in, checkpoints and served weights out."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from megatron_klong.config import RlConfig
from megatron_klong.inference.fleet import Fleet
from megatron_klong.inference.sync import BrokenOffError, DisagreedError, Probe, SyncError, WeightSync
from megatron_klong.inference.transfers import trainer_init_info
from megatron_klong.inference.weight_source import SENDER, MegatronWeightSource
from megatron_klong.inference.wire import ServerError
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.platform import Platform
from megatron_klong.rl.batches import batch_folder, read_batch
from megatron_klong.rl.exchange import Done, Exchange, Finished, Learned, Served, ServerAddress
from megatron_klong.rl.learner import Learner
from megatron_klong.training.checkpointing import load_checkpoint, resume_checkpoint, save_checkpoint
from megatron_klong.training.first_rank import on_first
from megatron_klong.training.rank_entry import RankError
from megatron_klong.training.run_directory import RunDirectory
from megatron_klong.training.score import score_tokens
from megatron_klong.training.trainer import build_trainer

_POLL_SECONDS = 0.1
_RETRY_SECONDS = 2.0
_BEAT_SECONDS = 20.0
"""Ranks that wait for the first one hear from it this often: a collective that takes minutes is taken for a
hang, and rollouts take hours."""

_PROBES = 3
_DISAGREEMENTS = 5


@dataclass(frozen=True)
class RlProgress:
    """Where a run stands.

    Attributes:
        step: optimizer steps done.
        iteration: batches trained on.
        lineage: names the run in the versions of its weights.
        consumed: ids of all groups that were trained on.
    """

    step: int
    iteration: int
    lineage: str
    consumed: tuple[str, ...]

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> RlProgress:
        """As it was saved."""
        return cls(**saved)


@dataclass(frozen=True)
class Work:
    """What is to be done next."""

    kind: Literal["batch", "sync", "end", "none"]
    number: int = 0


def run_rl_trainer(config: RlConfig, platform: Platform) -> None:
    """Train on every batch that appears, in order, until the orchestrator has finished.

    A checkpoint follows every batch, before its weights are served: so no weights are served that could be
    lost, and after a restart each batch is either in the checkpoint, or trained on from the same start.
    """
    run, exchange = RunDirectory(config.run.dir), Exchange(RunDirectory(config.run.dir).exchange)
    hf = load_hf_config(config.model.shape)
    trainer = build_trainer(config.trainer_settings, hf, platform)
    learner = Learner(trainer, config)
    progress = RlProgress(0, 0, on_first(exchange.lineage), ())
    saved = resume_checkpoint(run.checkpoints, _say)
    if saved is not None:
        progress = load_checkpoint(trainer, saved, RlProgress)
        _say(f"resumed from {saved.name}: iteration {progress.iteration} is trained on")
    serving = Serving(config, exchange, MegatronWeightSource(trainer.model, hf))

    def serve() -> Served:
        return serving.until_served(progress, score_tokens(trainer, serving.prompts))

    def finish(iteration: int, saving: float) -> Served:
        learned = on_first(lambda: exchange.heard(f"learned-{iteration}", Learned))
        assert learned is not None
        served = serve()
        seconds = learned.seconds + saving + served.seconds
        _tell(exchange, f"done-{iteration}", Done(served=served, updates=learned.updates, seconds=seconds))
        return served

    if progress.iteration and on_first(lambda: exchange.heard(f"done-{progress.iteration}", Done)) is None:
        finish(progress.iteration, saving=0.0)  # it ended between its checkpoint and the word of it
    answered = 0
    while (work := _next_work(run, exchange, progress.iteration, answered)).kind != "end":
        if work.kind == "none":
            continue
        if work.kind == "sync":
            _tell(exchange, f"served-{work.number}", serve())
            answered = work.number
            continue
        start = time.monotonic()
        batch = read_batch(run.batches, work.number)
        assert not set(batch.header.groups) & set(progress.consumed), "a group would be trained on twice"
        updates = learner.learn(batch)
        progress = RlProgress(
            progress.step + len(updates),
            work.number,
            progress.lineage,
            (*progress.consumed, *batch.header.groups),
        )
        learned = Learned(updates=updates, seconds=time.monotonic() - start)
        _tell(exchange, f"learned-{work.number}", learned)
        start = time.monotonic()
        save_checkpoint(trainer, progress, run.checkpoints, config.trainer.keep_last)
        served = finish(work.number, saving=time.monotonic() - start)
        _say(f"iteration {work.number}: loss {updates[0].loss:+.4f}; serving {served.version}")


class Serving:
    """Brings weights to the servers, as often as it takes."""

    def __init__(self, config: RlConfig, exchange: Exchange, source: MegatronWeightSource) -> None:
        self._config = config
        self._exchange = exchange
        self._source = source
        self._sync: tuple[tuple[ServerAddress, ...], WeightSync] | None = None
        random = np.random.default_rng(0)
        vocab, longest = load_hf_config(config.model.shape).vocab_size, config.window.max_tokens
        lengths = [max(2, longest // 2**n - 1) for n in range(_PROBES)]
        self.prompts = [tuple(int(t) for t in random.integers(0, vocab, length)) for length in lengths]
        """Token ids that the servers' log-probs are compared on."""

    def until_served(self, progress: RlProgress, log_probs: list[tuple[float, ...]]) -> Served:
        """Sync, and again after a failure, until all servers serve these weights; collective.

        Args:
            progress: names the version.
            log_probs: the trainer's, of :attr:`prompts`.

        Raises:
            RankError: servers that had all the weights disagreed with the trainer several times in a row, or
                none of the syncs in ``trainer.sync_seconds`` came through.
        """
        version = f"{progress.lineage}:{progress.iteration}"
        probes = [Probe(ids, given) for ids, given in zip(self.prompts, log_probs)]
        disagreed, failing_since = 0, 0.0
        while True:
            start = time.monotonic()
            try:
                report = self._connected().run(version, probes)
            except (SyncError, ServerError) as error:
                disagreed = disagreed + 1 if isinstance(error, DisagreedError) else 0
                if disagreed == _DISAGREEMENTS:
                    raise RankError(
                        f"{error} (trainer.sync_tolerance), {disagreed} times in a row"
                    ) from error
                now = on_first(time.monotonic)
                failing_since = failing_since or now
                if now - failing_since > self._config.trainer.sync_seconds:
                    raise RankError(
                        f"{error}; no sync has come through in "
                        f"trainer.sync_seconds={self._config.trainer.sync_seconds:g}"
                    ) from error
                _say(f"not served yet: {error}")
                if isinstance(error, BrokenOffError):
                    self._ask_for_restarts()
                self._sync = None  # its servers may come back elsewhere
                time.sleep(_RETRY_SECONDS)
                continue
            return Served(
                iteration=progress.iteration, version=version, difference=report.difference,
                bytes=report.bytes, seconds=time.monotonic() - start,
            )  # fmt: skip

    def _connected(self) -> WeightSync:
        servers: tuple[ServerAddress, ...] = ()
        while len(servers) < self._config.servers:
            servers = tuple(on_first(self._servers))
        if self._sync is None or self._sync[0] != servers:
            rank = torch.distributed.get_rank()
            fleet = Fleet([server.url for server in servers]) if rank == SENDER else None
            way = self._config.server.transfer
            info = trainer_init_info(way, rank, fleet, self._source, self._config.trainer.chunk_bytes)
            self._sync = servers, WeightSync(self._source, info, fleet, self._config.sync_tolerance)
        return self._sync[1]

    def _ask_for_restarts(self) -> None:
        """Of the very servers that the sync was with: some may have been started again since."""
        assert self._sync is not None
        for number, address in enumerate(self._sync[0]):
            _tell(self._exchange, f"restart-{number}", address)

    def _servers(self) -> list[ServerAddress]:
        """Where servers listen: all of them, or after a while those that have said so."""
        deadline = time.monotonic() + _BEAT_SECONDS
        while True:
            servers = self._exchange.servers(self._config.servers)
            if len(servers) == self._config.servers or time.monotonic() > deadline:
                return servers
            time.sleep(_POLL_SECONDS)


def _next_work(run: RunDirectory, exchange: Exchange, iteration: int, answered: int) -> Work:
    """Wait a while for a batch, a request or the end; all ranks learn the same."""

    def wait() -> Work:
        deadline = time.monotonic() + _BEAT_SECONDS
        while time.monotonic() < deadline:
            request = exchange.last_request()
            if request > answered and exchange.heard(f"served-{request}", Served) is None:
                return Work("sync", request)
            if batch_folder(run.batches, iteration + 1).is_dir():
                return Work("batch", iteration + 1)
            if exchange.heard("finished", Finished) is not None:
                return Work("end")
            time.sleep(_POLL_SECONDS)
        return Work("none")

    return on_first(wait)


def _tell(exchange: Exchange, name: str, message: Served | Learned | Done | ServerAddress) -> None:
    if torch.distributed.get_rank() == 0:
        exchange.tell(name, message)


def _say(text: str) -> None:
    if torch.distributed.get_rank() == 0:
        print(f"trainer: {text}", file=sys.stderr, flush=True)
