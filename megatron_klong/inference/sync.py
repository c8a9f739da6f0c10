"""The sync protocol: the trainer's weights reach all servers, and are proven there, before anyone is served.

On the trainer's side: pause, tag as unsynced, send, forget the caches, resume, probe, tag. The gate
(:mod:`megatron_klong.inference.gate`) is the orchestrator's: closed before, opened after the report.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile

import torch
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from megatron_klong.inference.agreement import differences
from megatron_klong.inference.fleet import FRESH, Fleet
from megatron_klong.inference.weight_source import SENDER, MegatronWeightSource
from megatron_klong.inference.wire import ServerError


class SyncError(RuntimeError):
    """A sync failed: the servers stay paused, and serve nothing until a sync has come through."""


class BrokenOffError(SyncError):
    """An update ended half way that vLLM cannot give up: no other one comes through before the servers are
    started again."""


class DisagreedError(SyncError):
    """The servers had all the weights, but their log-probs are not the trainer's."""


@dataclass(frozen=True)
class Probe:
    """Tokens, and what the trainer says of them.

    Attributes:
        token_ids: a prompt.
        log_probs: the trainer's log-prob of every token but the first, at temperature 1.
    """

    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]


@dataclass(frozen=True)
class SyncReport:
    """What a sync did.

    Attributes:
        version: the weights that are now served.
        tensors, bytes: what was sent to each server.
        seconds: by phase: ``pause``, ``send``, and on the sender ``reset``, ``probe``.
        difference: largest one of a log-prob between trainer and any server, counted likewise.
    """

    version: str
    tensors: int
    bytes: int
    seconds: dict[str, float]
    difference: float


@dataclass
class WeightSync:
    """Brings the weights of a trainer to its servers; every rank of the trainer has one.

    Attributes:
        source: the weights.
        init_info: which way they go; vLLM's ``NCCLTrainerInitInfo`` or ``IPCTrainerInitInfo``, or
            our ``SharedMemoryTrainerInitInfo``.
        fleet: the servers, on the sender; None on other ranks.
        tolerance: how far a log-prob may be off in the probe (design: 1e-4 in fp32), as
            :func:`~megatron_klong.inference.agreement.differences` counts.
    """

    source: MegatronWeightSource
    init_info: TrainerInitInfo
    fleet: Fleet | None
    tolerance: float
    _engine: TrainerWeightTransferEngine[TrainerInitInfo] | None = field(default=None, init=False)

    def run(self, version: str, probes: Sequence[Probe]) -> SyncReport:
        """One sync; collective. Whatever goes wrong, all ranks hear of it and go on together.

        Args:
            version: tag of these weights.
            probes: prompts with this trainer's log-probs of them (needed on the sender only).

        Raises:
            SyncError: on every rank alike, with what went wrong; nothing new is served. A
                :class:`BrokenOffError` where it was begun by another way than shared memory.
        """
        assert version not in (FRESH, "") and not version.startswith("unsynced")
        clock, begun = _Clock(), False
        try:
            with clock.phase("pause"):
                self._on_sender(lambda fleet: self._shut(fleet, version))
                self._connect_if_needed()
            with clock.phase("send"):
                self._prepare()
                begun = True
                self._send()
                begun = False
            difference = self._on_sender(lambda fleet: self._serve(fleet, version, probes, clock))
        except _Failed as failed:
            self._disconnect()
            kind = DisagreedError if failed.disagreed else SyncError
            if begun and self.init_info.backend != "shm":
                kind = BrokenOffError
            raise kind(
                f"weights {version!r} did not reach the servers, which stay paused: {failed}"
            ) from None
        meta = self.source.metadata()
        sizes = [torch.Size(each.shape).numel() * each.dtype.itemsize for each in meta]
        return SyncReport(version, len(meta), sum(sizes), clock.seconds, difference)

    def _shut(self, fleet: Fleet, version: str) -> None:
        fleet.pause()
        found = fleet.versions()
        fleet.set_version(f"unsynced {version}")
        if FRESH in found:
            self._disconnect()  # a server was started since: it has to join anew

    def _connect_if_needed(self) -> None:
        """Build the transfer engine on all ranks, when the sender says so."""
        needed = [self._engine is None]
        torch.distributed.broadcast_object_list(needed, SENDER)
        if needed[0]:
            self._disconnect()
            self._together(self._connect)

    def _disconnect(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()
        self._engine = None

    def _connect(self) -> None:
        client = self.fleet if self.fleet is not None else _Nobody()
        self._engine = WeightTransferTrainerFactory.trainer_init(
            self.init_info, client=client, source=self.source
        )

    def _prepare(self) -> None:
        try:
            self.source.prepare()
        except RuntimeError as error:
            raise _Failed(str(error)) from error

    def _send(self) -> None:
        engine = self._engine
        assert engine is not None

        def send() -> None:
            try:
                engine.send_weights()
            except Exception:
                # The other ranks are still handing over their shares.
                self.source.drain()
                raise

        self._together(send)

    def _serve(self, fleet: Fleet, version: str, probes: Sequence[Probe], clock: _Clock) -> float:
        with clock.phase("reset"):
            fleet.reset_prefix_cache()
        with clock.phase("probe"):
            fleet.resume()
            try:
                difference = self._probe(fleet, f"unsynced {version}", probes)
                fleet.set_version(version)
            except Exception:
                with suppress(ServerError):  # the first failure is the one to tell
                    fleet.pause()
                with suppress(ServerError):
                    fleet.set_version(f"unsynced {version}")
                raise
        return difference

    def _probe(self, fleet: Fleet, tag: str, probes: Sequence[Probe]) -> float:
        """Ask every server for what the trainer knows: past the prefix cache, and through it."""
        if not probes:
            raise ServerError("no probes were given; unproven weights are not served")
        worst = 0.0
        for number, probe in enumerate(probes):
            # What probes before this one have put there anew is not stale.
            known = max((_common(probe, other) for other in probes[:number]), default=0)
            prompt, last = probe.token_ids[:-1], probe.token_ids[-1]
            for url, (log_prob, cached, spans) in zip(fleet.urls, fleet.next_token(prompt, last)):
                if cached > known:
                    raise ServerError(f"{url}: {cached} tokens of a probe came from a cache just cleared")
                if [span.version for span in spans] != [tag]:
                    raise ServerError(f"{url}: a probe was answered by {spans}, not by {tag!r}")
                worst = max(worst, self._compare(url, probe, len(prompt) - 1, [log_prob]))
            for url, log_probs in zip(fleet.urls, fleet.score(probe.token_ids)):
                worst = max(worst, self._compare(url, probe, 0, log_probs))
        return worst

    def _compare(self, url: str, probe: Probe, start: int, theirs: Sequence[float]) -> float:
        ours = probe.log_probs[start:]
        apart = differences(ours, theirs)
        # A NaN on either side compares false: it must not pass.
        if not all(difference <= self.tolerance for difference in apart):
            place = next(n for n, difference in enumerate(apart) if not difference <= self.tolerance)
            raise _DisagreeError(
                f"{url}: token {start + place + 1} of a probe of {len(probe.token_ids)} has log-prob "
                f"{theirs[place]:.6f} there and {ours[place]:.6f} in the trainer, more than the "
                f"tolerance {self.tolerance:g} apart"
            )
        return max(apart)

    def _on_sender(self, work: Callable[[Fleet], float | None]) -> float:
        """Run on the sender alone; its result or its failure goes to every rank."""
        result = 0.0

        def run() -> None:
            nonlocal result
            if self.fleet is not None:
                result = work(self.fleet) or 0.0

        self._together(run)
        shared = [result]
        torch.distributed.broadcast_object_list(shared, SENDER)
        return float(shared[0])

    def _together(self, work: Callable[[], None]) -> None:
        """Run on all ranks; if any fails, all raise the first failure."""
        error, disagreed = "", False
        try:
            work()
        except Exception as failed:
            name = "ServerError" if isinstance(failed, _DisagreeError) else type(failed).__name__
            error = f"{name}: {failed}" if str(failed) else repr(failed)
            disagreed = isinstance(failed, _DisagreeError)
        errors = [("", False)] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(errors, (error, disagreed))
        for said, was_probe in errors:
            if said:
                raise _Failed(said, was_probe)


def _common(probe: Probe, other: Probe) -> int:
    """Tokens that two probes begin with alike."""
    pairs = zip(probe.token_ids, other.token_ids)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


class _DisagreeError(ServerError):
    """A server's log-prob is not the trainer's."""


class _Failed(Exception):  # noqa: N818 (it is carried, not reported)
    """What went wrong, as agreed by all ranks."""

    def __init__(self, text: str, disagreed: bool = False) -> None:
        super().__init__(text)
        self.disagreed = disagreed


class _Nobody:
    """Stands for the servers on ranks that do not speak to them."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        raise AssertionError(f"only the sender may call {name}")


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = time.perf_counter() - start
