"""Writing a token store: in shards, each a stretch of the input, which become one store at the end.

A shard is a folder with the parts of a store, complete or absent. So several processes write at a time, what
was written stays when they are stopped, and the store depends on neither. Megatron is imported only where
shards are joined: the processes that make them start in a fraction of a second without it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from megatron_klong.data.blocks import TRAINED, TrajectoryLabel
from megatron_klong.data.header import (
    FORMAT_VERSION,
    MARKER_TEXT,
    NOTE_TEXT,
    PARTS,
    StoreHeader,
    part,
)
from megatron_klong.trajectory.render import RenderedTrajectory, Renderer
from megatron_klong.trajectory.schema import Trajectory, initial_messages, turns

_COPIED = 1 << 24


@dataclass(frozen=True)
class ShardCounts:
    """``shard.json``: what a shard holds.

    Attributes:
        tool_sets: names of the tools that turns call, by the number that the shard's turns have.
    """

    trajectories: int
    tokens: int
    trained_tokens: int
    tool_sets: tuple[tuple[str, ...], ...]


class ShardWriter:
    """Writes a shard; use it as a context manager. The folder appears at the end, complete.

    Args:
        opening_tokens: how many tokens open an action; they carry no loss.
        dtype: of token ids, such as ``uint16``.
    """

    def __init__(self, folder: Path, opening_tokens: int, dtype: str) -> None:
        self._folder = folder
        self._building = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
        self._opening = opening_tokens
        self._dtype = np.dtype(dtype)
        self._tool_sets: dict[tuple[str, ...], int] = {}
        self._trajectories = self._tokens = self._trained = 0

    def __enter__(self) -> ShardWriter:
        shutil.rmtree(self._building, ignore_errors=True)
        self._building.mkdir(parents=True)
        names = ("bin", "marks", "turns", "sizes", "trajectories.jsonl")
        self._files = {name: (self._building / name).open("wb") for name in names}
        return self

    def add(self, trajectory: Trajectory, rendered: RenderedTrajectory) -> None:
        """Append one trajectory.

        Raises:
            ValueError: its ``prefix_messages`` ends inside a block.
        """
        label = TrajectoryLabel(
            trajectory.id, trajectory.task_id, trajectory.reward, _marked_turns(trajectory)
        )
        actions = [turn.action for turn in turns(trajectory.messages)]
        ids, sizes, marks = list(rendered.initial.ids), [len(rendered.initial.ids)], rendered.initial.kinds
        for turn, action in zip(rendered.turns, actions, strict=True):
            ids += turn.action.ids + turn.answer.ids
            sizes += [len(turn.action.ids), len(turn.answer.ids)]
            kinds = turn.action.kinds
            if not action.context_only:
                trained = bytes(kind | TRAINED for kind in kinds[self._opening :])
                kinds = kinds[: self._opening] + trained
                self._trained += len(trained)
            marks += kinds + turn.answer.kinds
        numbers = [
            2 * self._tool_set(tuple(call.name for call in action.tool_calls)) + action.context_only
            for action in actions
        ]
        self._files["bin"].write(np.array(ids, dtype=self._dtype).tobytes())
        self._files["marks"].write(marks)
        self._files["turns"].write(np.array(numbers, dtype=np.int32).tobytes())
        self._files["sizes"].write(np.array([len(sizes), *sizes], dtype=np.int32).tobytes())
        self._files["trajectories.jsonl"].write(
            (json.dumps(asdict(label), ensure_ascii=False) + "\n").encode()
        )
        self._trajectories += 1
        self._tokens += len(ids)

    def _tool_set(self, tools: tuple[str, ...]) -> int:
        return self._tool_sets.setdefault(tools, len(self._tool_sets))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.close()
        if kind is not None:
            shutil.rmtree(self._building, ignore_errors=True)
            return
        counts = ShardCounts(self._trajectories, self._tokens, self._trained, tuple(self._tool_sets))
        (self._building / "shard.json").write_text(json.dumps(asdict(counts)))
        os.replace(self._building, self._folder)


def read_counts(shard: Path) -> ShardCounts:
    """What a shard holds."""
    raw = json.loads((shard / "shard.json").read_text())
    return ShardCounts(**{**raw, "tool_sets": tuple(map(tuple, raw["tool_sets"]))})


def join_shards(shards: Sequence[Path], prefix: Path, renderer: Renderer, tokenizer: Path) -> StoreHeader:
    """One store of all shards, in order. Nothing appears under the prefix before it is complete.

    Args:
        tokenizer: the ``tokenizer.json``, which becomes a part of the store.

    Raises:
        ValueError: two trajectories have one id, or the store cannot be written.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    building = shards[0].parent / "joined"
    counts = [read_counts(shard) for shard in shards]
    tool_sets = tuple(dict.fromkeys(tools for each in counts for tools in each.tool_sets))
    content = hashlib.sha256()
    builder = IndexedDatasetBuilder(
        str(part(building, "bin")), dtype=DType.optimal_dtype(renderer.vocab_size)
    )
    with builder.data_file:
        content.update(_copied([shard / "bin" for shard in shards], builder.data_file))
    for lengths in (_sizes(shard) for shard in shards):
        content.update(lengths.tobytes())
        place = 0
        while place < len(lengths):
            count = int(lengths[place])
            builder.sequence_lengths.extend(lengths[place + 1 : place + 1 + count].tolist())
            builder.document_indices.append(len(builder.sequence_lengths))
            place += 1 + count
    builder.finalize(str(part(building, "idx")))
    for name in ("marks", "trajectories.jsonl"):
        with part(building, name).open("wb") as target:
            content.update(_copied([shard / name for shard in shards], target))
    _require_unique(part(building, "trajectories.jsonl"), prefix)
    with part(building, "turns").open("wb") as target:
        for shard, each in zip(shards, counts):
            numbers = np.fromfile(shard / "turns", dtype=np.int32)
            renamed = np.array([tool_sets.index(tools) for tools in each.tool_sets], dtype=np.int32)
            joined = (2 * renamed[numbers // 2] + numbers % 2).astype(np.int32).tobytes()
            content.update(joined)
            target.write(joined)
    shutil.copyfile(tokenizer, part(building, "tokenizer.json"))
    inserted = (renderer.opening_ids, renderer.marker(MARKER_TEXT), renderer.note(NOTE_TEXT))
    content.update(json.dumps([inserted, tool_sets]).encode())
    header = StoreHeader(
        version=FORMAT_VERSION,
        renderer=renderer.format.name,
        tokenizer_sha256=renderer.fingerprint,
        vocab_size=renderer.vocab_size,
        opening_ids=inserted[0],
        marker_ids=inserted[1],
        note_ids=inserted[2],
        tool_sets=tool_sets,
        trajectories=sum(each.trajectories for each in counts),
        tokens=sum(each.tokens for each in counts),
        trained_tokens=sum(each.trained_tokens for each in counts),
        content_sha256=content.hexdigest(),
    )
    part(building, "json").write_text(json.dumps(asdict(header), indent=2) + "\n")
    _publish(building, prefix)
    return header


def _publish(building: Path, prefix: Path) -> None:
    for suffix in PARTS:
        if part(prefix, suffix).is_dir():
            raise ValueError(f"store {prefix}: {part(prefix, suffix)} is a directory")
    # Without a header there is no store: the old one is gone before its parts are replaced.
    part(prefix, "json").unlink(missing_ok=True)
    for suffix in PARTS:
        os.replace(part(building, suffix), part(prefix, suffix))


def _copied(files: Sequence[Path], target: IO[bytes]) -> bytes:
    """Append files to a stream; the hash of what was copied."""
    seen = hashlib.sha256()
    for file in files:
        with file.open("rb") as source:
            while piece := source.read(_COPIED):
                seen.update(piece)
                target.write(piece)
    return seen.digest()


def _sizes(shard: Path) -> np.ndarray:
    """For each trajectory the number of its blocks, then their lengths."""
    return np.fromfile(shard / "sizes", dtype=np.int32)


def _require_unique(labels: Path, prefix: Path) -> None:
    seen: set[str] = set()
    with labels.open(encoding="utf-8") as lines:
        for line in lines:
            name = json.loads(line)["id"]
            if name in seen:
                raise ValueError(f"store {prefix}: two trajectories have the id {name!r}")
            seen.add(name)


def _marked_turns(trajectory: Trajectory) -> int | None:
    """How many whole turns the first ``prefix_messages`` messages cover."""
    if trajectory.prefix_messages is None:
        return None
    ends = list(_block_ends(trajectory))
    if trajectory.prefix_messages not in ends:
        raise ValueError(
            f"trajectory {trajectory.id!r}: prefix_messages={trajectory.prefix_messages} must end "
            f"the initial messages or a whole turn, such as {ends[:3]}"
        )
    return ends.index(trajectory.prefix_messages)


def _block_ends(trajectory: Trajectory) -> Iterator[int]:
    end = len(initial_messages(trajectory.messages))
    yield end
    for turn in turns(trajectory.messages):
        end += 1 + len(turn.answer)
        yield end
