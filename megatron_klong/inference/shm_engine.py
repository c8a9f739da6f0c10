"""Weights through shared memory: the sides of vLLM's weight transfer for trainer and server on one machine.

The trainer fills one of two segments while the server loads from the other. Every chunk carries the
number of its sync, and a checksum for each tensor; the last message of a sync commits it, and the
server takes the commit only when it has every tensor of the model. An update that fails anywhere is
abandoned: the server stays paused with unusable weights until a whole sync has come through.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import vllm
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    TrainerInitInfo,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from megatron_klong.inference.cpu_moe import forget_kernels
from megatron_klong.inference.shm_segment import Segment, Slot, aligned
from megatron_klong.model.hf_config import load_hf_config
from megatron_klong.model.weight_map import is_prediction, weight_rules

CHUNK_BYTES = 64 << 20


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Where the segments are."""

    segments: list[str]


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """One message of a sync.

    Attributes:
        sync: number of the sync, drawn by the trainer; 0 with ``abandon``.
        segment: which segment the tensors are in.
        slots: the tensors, as fields of :class:`Slot`.
        commit: this is the last message, and all tensors have been sent.
        abandon: forget the update under way.
    """

    sync: int = 0
    segment: int = 0
    slots: list[dict[str, Any]] = field(default_factory=list)
    commit: bool = False
    abandon: bool = False


class SharedMemoryEngine(WeightTransferEngine[SharedMemoryInitInfo, SharedMemoryUpdateInfo]):
    """The server's side, in each of vLLM's workers."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        config = load_hf_config(Path(self.model_config.model))
        rules = [rule for rule in weight_rules(config).values() if not is_prediction(rule)]
        self._expected = {part.name: part.shape for rule in rules for part in rule.hf}
        self._segments: list[Segment] = []
        self._received: set[str] = set()
        self._sync = 0
        self._loading = False
        self._committed = False

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        self._segments = [Segment(Path(path)) for path in init_info.segments]

    def start_weight_update(self) -> None:
        if self._loading:
            self._abandon()
        if self.device.type == "cpu":
            forget_kernels(self.model, vllm.__version__)
        initialize_layerwise_reload(self.model)
        self._received, self._sync, self._loading, self._committed = set(), 0, True, False

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        if update_info.abandon:
            self._abandon()
            raise RuntimeError("the weight update was abandoned, as asked")
        if self._sync and update_info.sync != self._sync:
            raise ValueError(f"a chunk of sync {update_info.sync} came late, into sync {self._sync}")
        self._sync = update_info.sync
        slots = [Slot(**{**slot, "shape": tuple(slot["shape"])}) for slot in update_info.slots]
        if slots:
            model: Any = self.model
            model.load_weights(list(self._tensors(update_info.segment, slots)))
        if update_info.commit:
            missing = sorted(self._expected.keys() - self._received)
            if missing:
                raise ValueError(
                    f"the weight update lacks {len(missing)} of {len(self._expected)} tensors; the first "
                    f"is {missing[0]!r}"
                )
            self._committed = True

    def finish_weight_update(self) -> None:
        if not self._committed:
            raise RuntimeError(
                f"the weight update was not committed; {len(self._received)} of {len(self._expected)} "
                "tensors have come"
            )
        finalize_layerwise_reload(self.model, self.model_config)
        self._loading = False

    def shutdown(self) -> None:
        self._segments = []

    def _tensors(self, number: int, slots: list[Slot]) -> Iterator[tuple[str, Tensor]]:
        segment = self._segments[number]
        for slot in slots:
            shared = segment.view(slot.dtype, slot.shape, slot.offset)
            if segment.checksum(slot.offset, shared.nbytes) != slot.checksum:
                raise ValueError(f"tensor {slot.name!r} was changed on its way: its checksum differs")
            if slot.name not in self._expected or slot.name in self._received:
                raise ValueError(f"tensor {slot.name!r} is none of the model's, or came twice")
            if slot.shape != self._expected[slot.name]:
                # vLLM's loaders would fill a part of an expert with it, and say nothing.
                raise ValueError(
                    f"tensor {slot.name!r} came with shape {slot.shape}, the model's has "
                    f"{self._expected[slot.name]}"
                )
            self._received.add(slot.name)
            # vLLM keeps tensors until their layer is complete, and the segment is filled again.
            yield slot.name, shared.clone()

    def _abandon(self) -> None:
        """Leave vLLM's reloading mode; what is loaded then is of no use, but of the right form."""
        if self._loading:
            finalize_layerwise_reload(self.model, self.model_config)
        self._loading = False


@dataclass
class SharedMemoryTrainerInitInfo(TrainerInitInfo):
    """The trainer's settings.

    Attributes:
        chunk_bytes: memory of a segment, unless a single tensor is larger. Two are used.
        timeout_seconds: a sync in which a tensor is not ready by then has failed.
    """

    backend: ClassVar[str] = "shm"
    chunk_bytes: int = CHUNK_BYTES
    timeout_seconds: float = 600.0


class SharedMemoryTrainerEngine(TrainerWeightTransferEngine[SharedMemoryTrainerInitInfo]):
    """The trainer's side, on every rank; only the sender has segments and talks to the server."""

    init_info_cls = SharedMemoryTrainerInitInfo

    def __init__(
        self,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource,
        info: SharedMemoryTrainerInitInfo,
    ) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        self._timeout = info.timeout_seconds
        self._segments: list[Segment] = []
        self._size = max(info.chunk_bytes, *(aligned(_nbytes(meta)) for meta in source.metadata()))

    @classmethod
    def trainer_init(
        cls,
        init_info: SharedMemoryTrainerInitInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Make the segments and have the server map them."""
        if source is None:
            raise ValueError("shm: a WeightSource is needed")
        engine = cls(client=client, source=source, info=init_info)
        if engine.is_sender:
            try:
                for _ in range(2):
                    engine._segments.append(Segment.create(engine._size))
                client.init_weight_transfer_engine({"segments": [str(s.path) for s in engine._segments]})
            finally:
                for segment in engine._segments:
                    segment.unlink()  # the server has mapped it: the memory goes with the processes
        return engine

    def send_weights(self) -> None:
        """One whole sync; collective over the trainer's ranks."""
        assert self.source is not None
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        # Drawn at random, so that no message of a trainer before this one can be taken for ours.
        sync = 1 + secrets.randbelow(2**53)
        self._start()
        try:
            with ThreadPoolExecutor(max_workers=1) as sending:
                self._send(sync, sending)
            self.client.update_weights(asdict(SharedMemoryUpdateInfo(sync=sync, commit=True)))
            self.client.finish_weight_update()
        except BaseException:
            self._abandon()
            raise

    def _start(self) -> None:
        try:
            self.client.start_weight_update()
        except RuntimeError:
            # A trainer before us may have died in the middle of an update.
            self._abandon()
            self.client.start_weight_update()

    def _abandon(self) -> None:
        # The server answers by an error, and one that is gone has nothing to abandon.
        with contextlib.suppress(RuntimeError):
            self.client.update_weights(asdict(SharedMemoryUpdateInfo(abandon=True)))

    def _send(self, sync: int, sending: ThreadPoolExecutor) -> None:
        """Fill one segment while the server loads from the other."""
        under_way: list[Future[None] | None] = [None, None]
        number, filled = 0, 0
        slots: list[Slot] = []

        def flush() -> None:
            nonlocal number, slots, filled
            message = SharedMemoryUpdateInfo(
                sync=sync, segment=number, slots=[asdict(slot) for slot in slots]
            )
            under_way[number] = sending.submit(self.client.update_weights, asdict(message))
            number, slots, filled = 1 - number, [], 0
            waiting = under_way[number]
            if waiting is not None:
                waiting.result()  # this segment is free again, or the server has refused it

        for name, tensor in self._in_time():
            if filled + aligned(tensor.nbytes) > self._size:
                flush()
            slots.append(self._segments[number].put(name, tensor, filled))
            filled += aligned(tensor.nbytes)
        flush()
        for future in under_way:
            if future is not None:
                future.result()

    def _in_time(self) -> Iterator[tuple[str, Tensor]]:
        assert self.source is not None
        deadline = time.monotonic() + self._timeout
        for name, tensor in self.source:
            if time.monotonic() > deadline:
                raise TimeoutError(f"tensor {name!r} came too late: after {self._timeout:.0f} s of the sync")
            yield name, tensor

    def shutdown(self) -> None:
        """Unmap the segments."""
        self._segments = []


def _nbytes(meta: Any) -> int:
    return int(torch.Size(meta.shape).numel() * meta.dtype.itemsize)
