"""Imported trajectories to a token store: on all cores, in bounded memory, going on after an interruption."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

from megatron_klong.data.header import FORMAT_VERSION, StoreHeader
from megatron_klong.data.shards import ShardWriter, join_shards, read_counts
from megatron_klong.platform.lifetime import die_with_parent, held_folder
from megatron_klong.trajectory.encoder import SlowEncoder
from megatron_klong.trajectory.importing import read_imported_lines
from megatron_klong.trajectory.render import RenderedTrajectory, load_renderer
from megatron_klong.trajectory.schema import Trajectory

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
    tokenizer = tokenizer if tokenizer.is_file() else tokenizer / "tokenizer.json"
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
        now = file.stat()
        if (now.st_size, now.st_mtime_ns) != (seen.st_size, seen.st_mtime_ns):
            raise ValueError(f"{file}: was changed while it was read; run this again")
        return join_shards(shards, prefix, rendering, tokenizer)


def _id_type(vocab_size: int) -> str:
    """The smallest type that Megatron keeps ids of such a vocabulary in."""
    from megatron.core.datasets.indexed_dataset import DType

    return np.dtype(DType.optimal_dtype(vocab_size)).name


@contextmanager
def _building(prefix: Path, job: TokenizeJob) -> Iterator[Path]:
    """The folder of a job's shards; those of other jobs for the same store are removed."""
    root = prefix.with_name(f".{prefix.name}.building")
    folder = root / hashlib.sha256(json.dumps(asdict(job)).encode()).hexdigest()[:16]
    try:
        with held_folder(root, f"store {prefix}: another process is writing it; wait for it"):
            for other in root.iterdir():
                if other != folder:
                    shutil.rmtree(other)
            folder.mkdir(exist_ok=True)
            try:
                yield folder
            except BaseException:
                if not any(folder.glob("shard-*")):
                    shutil.rmtree(root)  # nothing to go on with
                raise
            shutil.rmtree(root)
    except OSError as error:
        raise ValueError(f"store {prefix}: cannot be written: {error.strerror}") from error


def _rendered(job: TokenizeJob, folder: Path, missing: list[int], processes: int) -> Iterator[None]:
    """Make the missing shards; yields after each."""
    if len(missing) <= 1 or processes == 1:
        for number in missing:
            _render_shard(job, folder, number)
            yield
        return
    pool = ProcessPoolExecutor(
        min(processes, len(missing)), mp_context=multiprocessing.get_context("spawn"),
        initializer=_begin_worker, initargs=(os.getpid(),),
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


def _begin_worker(parent: int) -> None:
    die_with_parent(parent, signal.SIGKILL)  # or it would write on into what the next run makes
    # The processes are what runs in parallel.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RAYON_NUM_THREADS"] = "1"


def _render_shard(job: TokenizeJob, folder: Path, number: int) -> None:
    """In a process of its own: the trajectories whose lines begin in a stretch of the file."""
    renderer = load_renderer(job.renderer, Path(job.tokenizer))
    start = number * job.shard_bytes
    opening = len(renderer.opening_ids)
    with ShardWriter(folder / f"shard-{number:06d}", opening, job.dtype) as writer:
        lines = read_imported_lines(Path(job.file), start, start + job.shard_bytes)
        for place, trajectory in enumerate(lines):
            rendered = renderer.render(trajectory)
            if place == 0:
                _compare(job, trajectory, rendered)
            writer.add(trajectory, rendered)


def _compare(job: TokenizeJob, trajectory: Trajectory, rendered: RenderedTrajectory) -> None:
    """One trajectory of every shard is rendered by the reference too: other ids would be silent and dear."""
    if load_renderer(job.renderer, Path(job.tokenizer), SlowEncoder).render(trajectory) != rendered:
        raise ValueError(
            f"tokenizer {job.tokenizer}: fastokens {version('fastokens')} gives other ids than tokenizers in "
            f"trajectory {trajectory.id!r}; uninstall fastokens"
        )
