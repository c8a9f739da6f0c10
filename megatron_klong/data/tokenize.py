"""Imported trajectories to a token store: on all cores, in bounded memory, going on after an interruption."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_klong.data.header import FORMAT_VERSION, StoreHeader
from megatron_klong.data.shards import ShardWriter, join_shards, read_counts
from megatron_klong.trajectory.importing import read_imported_lines
from megatron_klong.trajectory.render import load_renderer

SHARD_BYTES = 32 << 20
"""Of the input, in one shard; a trajectory belongs where its line begins."""


@dataclass(frozen=True)
class TokenizeJob:
    """What is tokenized; shards of another job are not gone on with.

    Attributes:
        size, changed: of the input file; bytes, and nanoseconds since 1970.
    """

    file: str
    size: int
    changed: int
    renderer: str
    tokenizer: str
    tokenizer_sha256: str
    shard_bytes: int
    dtype: str
    version: int = FORMAT_VERSION


@dataclass(frozen=True)
class TokenizeProgress:
    """How far it has come, in bytes of the input."""

    done: int
    total: int
    trajectories: int


def tokenize(
    file: Path,
    prefix: Path,
    *,
    renderer: str,
    tokenizer: Path,
    processes: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    on_progress: Callable[[TokenizeProgress], None] = lambda progress: None,
) -> StoreHeader:
    """Render every trajectory of an imported file once and write the store.

    What was done when it is interrupted lies beside the store in ``.NAME.building`` and is kept for the next
    call with the same inputs. The store is the same however many processes make it.

    Args:
        processes: at one time; default all cores.
        shard_bytes: of the input, done at one time by each.

    Raises:
        ValueError: unknown renderer, unfit tokenizer, invalid record, an empty file, or another process
            writes the same store.
    """
    rendering = load_renderer(renderer, tokenizer)
    try:
        seen = file.stat()
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from error
    job = TokenizeJob(
        str(file.resolve()), seen.st_size, seen.st_mtime_ns, renderer, str(tokenizer.resolve()),
        rendering.fingerprint, shard_bytes, _id_type(rendering.vocab_size),
    )  # fmt: skip
    with _building(prefix, job) as folder:
        starts = range(0, seen.st_size, shard_bytes)
        shards = [folder / f"shard-{number:06d}" for number in range(len(starts))]
        missing = [number for number, shard in enumerate(shards) if not shard.is_dir()]

        def progress() -> None:
            done = [number for number, shard in enumerate(shards) if shard.is_dir()]
            size = sum(min(shard_bytes, seen.st_size - starts[number]) for number in done)
            count = sum(read_counts(shards[number]).trajectories for number in done)
            on_progress(TokenizeProgress(size, seen.st_size, count))

        progress()
        for _ in _rendered(job, folder, missing, processes or os.cpu_count() or 1):
            progress()
        if not any(read_counts(shard).trajectories for shard in shards):
            raise ValueError(f"{file}: has no trajectories")
        header = join_shards(shards, prefix, rendering, tokenizer / "tokenizer.json")
        shutil.rmtree(folder)
    return header


def _id_type(vocab_size: int) -> str:
    """The smallest type that Megatron keeps ids of such a vocabulary in."""
    from megatron.core.datasets.indexed_dataset import DType

    return np.dtype(DType.optimal_dtype(vocab_size)).name


@contextmanager
def _building(prefix: Path, job: TokenizeJob) -> Iterator[Path]:
    """The folder that shards are made in; with those of before, if they are of the same job."""
    folder = prefix.with_name(f".{prefix.name}.building")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = prefix.with_name(f".{prefix.name}.lock").open("w")
    except OSError as error:
        raise ValueError(f"store {prefix}: cannot be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"store {prefix}: another process is writing it; wait for it") from None
        try:
            description = folder / "job.json"
            wanted = json.dumps(asdict(job))
            if not description.is_file() or description.read_text() != wanted:
                shutil.rmtree(folder)
                folder.mkdir()
                description.write_text(wanted)
            yield folder
        except OSError as error:
            raise ValueError(f"store {prefix}: cannot be written: {error.strerror}") from error
        finally:
            Path(lock.name).unlink(missing_ok=True)
            if folder.is_dir() and not any(folder.glob("shard-*")):
                shutil.rmtree(folder)  # nothing to go on with


def _rendered(job: TokenizeJob, folder: Path, missing: list[int], processes: int) -> Iterator[None]:
    """Make the missing shards; yields after each."""
    if len(missing) <= 1 or processes == 1:
        for number in missing:
            _render_shard(job, folder, number)
            yield
        return
    pool = ProcessPoolExecutor(
        min(processes, len(missing)), mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread
    )  # fmt: skip
    try:
        for shard in as_completed([pool.submit(_render_shard, job, folder, number) for number in missing]):
            shard.result()
            yield
    except BrokenProcessPool as error:
        raise ValueError(
            "tokenize: a process of it was killed (out of memory?); run it again with fewer --processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _one_thread() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what runs in parallel


def _render_shard(job: TokenizeJob, folder: Path, number: int) -> None:
    """In a process of its own: the trajectories whose lines begin in a stretch of the file."""
    renderer = load_renderer(job.renderer, Path(job.tokenizer))
    start = number * job.shard_bytes
    opening = len(renderer.opening_ids)
    with ShardWriter(folder / f"shard-{number:06d}", opening, job.dtype) as writer:
        for trajectory in read_imported_lines(Path(job.file), start, start + job.shard_bytes):
            writer.add(trajectory, renderer.render(trajectory))
