"""Megatron's distributed checkpoints, written by a thread while training goes on.

Megatron writes in forked processes and collects their results through a manager process, started anew in
every rank: seconds of start, and processes that stay when a rank is killed. Here the same functions write,
in a thread of the rank. What they write is a copy in host memory, so the next step may change the weights.

One of Megatron's module variables is set (``filesystem_async._results_queue``, the queue to that manager), by
:func:`_collect_in_process`; written for megatron-core 0.16, and refused where the variable is not there.
"""

from __future__ import annotations

import errno
import os
import queue
import shutil
import threading
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

_FULL_BYTES = 1 << 20
_LOOK_SECONDS = 1.0

Buckets = list[tuple[Any, str, tuple[list[Any], list[tuple[Any, Tensor]]]]]
"""Megatron's plan of what goes into each file: path, key, (bytes, tensors)."""


class BackgroundSave:
    """A checkpoint on its way to the disk.

    Args:
        state: what Megatron's ``dist_checkpointing.save`` takes.
        live: tensors that training will change; they are copied first.

    Raises:
        OSError: the first rank could not write the part that is not sharded; the others wait until they are
            ended.
    """

    def __init__(self, state: dict[str, Any], folder: Path, live: Iterable[Tensor]) -> None:
        _collect_in_process()
        self._folder = folder
        # Deals out the weights, which data-parallel copies share, and checks that all is written once.
        dealing = FullyParallelSaveStrategyWrapper(
            _ThreadedStrategy(set(map(_place, live))),
            parallel_state.get_data_parallel_group(with_context_parallel=True),
        )
        try:
            request = dist_checkpointing.save(
                state, str(folder), sharded_strategy=dealing, async_sharded_save=True,
                validate_access_integrity=False,
            )  # fmt: skip
        except RuntimeError as error:
            cause = _cause(error, folder / "common.pt")
            raise cause from None if cause is error else error
        assert request is not None
        self._finish: list[Callable[[], None]] = request.finalize_fns
        self._files: list[Path] = []
        self._thread: threading.Thread | None = None
        if request.async_fn is not None:
            self._files = [Path(bucket[0]) for bucket in request.async_fn_args[0]]
            # Not a daemon: an interpreter that ends waits for what is being written.
            self._thread = threading.Thread(
                target=request.async_fn, args=request.async_fn_args, name="checkpoint writer"
            )
            self._thread.start()

    def is_written(self) -> bool:
        """Whether all ranks have written their files; collective."""
        writing = torch.tensor(
            int(self._thread is not None and self._thread.is_alive()), device=torch.cuda.current_device()
        )
        torch.distributed.all_reduce(writing)
        return not writing.item()

    def finish(self, on_bytes: Callable[[], None]) -> None:
        """Wait for the files and write the index of them; collective.

        Args:
            on_bytes: called each time that this rank's files have grown meanwhile.

        Raises:
            OSError: a file could not be written, on any rank; all ranks know the reason.
        """
        written = 0
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(_LOOK_SECONDS)
            before, written = written, sum(file.stat().st_size for file in self._files if file.exists())
            if written > before:
                on_bytes()
        try:
            for step in self._finish:
                step()
        except CheckpointException as error:  # on every rank, but only the first has the reasons
            reasons = [" ".join(str(cause).split()) for cause, _ in error.failures.values()]
            shared = [reasons[0] if reasons else "unknown"]
            if torch.distributed.get_rank() == 0:  # what is said next goes to the same disk
                shutil.rmtree(self._folder, ignore_errors=True)
            torch.distributed.broadcast_object_list(shared, 0)
            raise OSError(shared[0]) from error


class _ThreadedStrategy(TorchDistSaveShardedStrategy):
    """Megatron's own, but for who writes."""

    def __init__(self, live: set[int]) -> None:
        super().__init__("torch_dist", 1)
        self._live = live

    def _get_save_and_finalize_callbacks(self, writer: FileSystemWriterAsync, planned: Any) -> AsyncRequest:
        request = super()._get_save_and_finalize_callbacks(writer, planned)
        if request.async_fn is None:
            return request
        buckets = [self._copied(bucket) for bucket in request.preload_fn()]
        transforms = [writer.transforms] if hasattr(writer, "transforms") else []
        # Not the queue that the writer may share with the save before.
        writer.results_queue = queue.Queue()
        return request._replace(
            async_fn=partial(_write, transforms),
            async_fn_args=[buckets, writer.results_queue],
            preload_fn=None,
        )

    def _copied(self, bucket: Any) -> Any:
        file, key, (data, tensors) = bucket
        copies = [
            (item, tensor.clone() if _place(tensor) in self._live else tensor) for item, tensor in tensors
        ]
        return file, key, (data, copies)


def _write(transforms: list[Any], buckets: Buckets, results: queue.Queue[Any]) -> None:
    """Write all files; leave Megatron's write results, or the exception, in ``results``."""
    written: dict[int, Any] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(number)
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, count, use_fsync=True)
        _, answer = answers.get()
        if isinstance(answer, Exception):
            results.put(_cause(answer, Path(bucket[0])))
            return
        written[number] = answer
    results.put(written)


def _cause(error: Exception, file: Path) -> Exception:
    """Of a full disk torch's writers say only that they are not where they should be in the file."""
    if isinstance(error, OSError) or shutil.disk_usage(file.parent).free > _FULL_BYTES:
        return error
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _collect_in_process() -> None:
    if not hasattr(filesystem_async, "_results_queue"):
        raise RuntimeError(
            "training.background_save is written for megatron-core 0.16; this one has no "
            "filesystem_async._results_queue. Install a supported version or port the module"
        )
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
