"""The token store: every trajectory's tokens once, in blocks, in Megatron's own format.

``PREFIX.bin`` and ``PREFIX.idx`` are a Megatron indexed dataset: one document per trajectory, one
sequence per block (initial messages, then action and answer of every turn, in turn).
``PREFIX.mask`` holds one byte per token, 1 where it carries loss. ``PREFIX.trajectories.jsonl``
names the trajectories and flags their turns. ``PREFIX.json`` is the header; it is written last, so
a store that has one is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDataset,
    IndexedDatasetBuilder,
)

from megatron_klong.data.blocks import StoredTrajectory, TrajectoryLabel, TurnLabel
from megatron_klong.data.header import (
    FORMAT_VERSION,
    MARKER_TEXT,
    NOTE_TEXT,
    PARTS,
    StoreHeader,
    part,
    read_header,
)
from megatron_klong.trajectory.render import RenderedTrajectory, Renderer
from megatron_klong.trajectory.schema import Trajectory, initial_messages, turns


class TokenStoreWriter:
    """Writes a store; use it as a context manager. Nothing appears under PREFIX before the end."""

    def __init__(self, prefix: Path, renderer: Renderer) -> None:
        self._prefix = prefix
        self._renderer = renderer
        self._building = prefix.with_name(f".{prefix.name}.{os.getpid()}.building")
        self._tokens = self._trained = self.trajectories = 0
        self._hash = hashlib.sha256()

    def __enter__(self) -> TokenStoreWriter:
        dtype = DType.optimal_dtype(self._renderer.vocab_size)
        try:
            self._prefix.parent.mkdir(parents=True, exist_ok=True)
            self._builder = IndexedDatasetBuilder(str(part(self._building, "bin")), dtype=dtype)
        except OSError as error:
            raise ValueError(f"store {self._prefix}: cannot be written: {error.strerror}") from error
        self._mask = part(self._building, "mask").open("wb")
        self._labels = part(self._building, "trajectories.jsonl").open("w", encoding="utf-8")
        return self

    def add(self, trajectory: Trajectory, rendered: RenderedTrajectory) -> None:
        """Append one trajectory.

        Raises:
            ValueError: its ``prefix_messages`` ends inside a block.
        """
        label = _label(trajectory)
        opening = len(self._renderer.opening_ids)
        blocks = [rendered.initial_ids]
        masks = [bytes(len(rendered.initial_ids))]
        for turn, turn_label in zip(rendered.turns, label.turns, strict=True):
            trained = not turn_label.context_only
            blocks += [turn.action_ids, turn.answer_ids]
            masks.append(bytes(opening) + bytes([trained]) * (len(turn.action_ids) - opening))
            masks.append(bytes(len(turn.answer_ids)))
        tokens = np.array([token for block in blocks for token in block], dtype=np.int64)
        self._builder.add_document(tokens, [len(block) for block in blocks])
        line = json.dumps(asdict(label), ensure_ascii=False) + "\n"
        self._labels.write(line)
        mask = b"".join(masks)
        self._mask.write(mask)
        sizes = np.array([len(block) for block in blocks], dtype=np.int64)
        for content in (sizes.tobytes(), tokens.tobytes(), mask, line.encode()):
            self._hash.update(content)
        self.trajectories += 1
        self._tokens += len(mask)
        self._trained += sum(mask)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._mask.close()
        self._labels.close()
        try:
            if kind is None:
                self._complete()
        finally:
            self._builder.data_file.close()
            for suffix in PARTS:
                part(self._building, suffix).unlink(missing_ok=True)

    def _complete(self) -> None:
        self._builder.finalize(str(part(self._building, "idx")))
        header = json.dumps(asdict(self._header()), indent=2)
        part(self._building, "json").write_text(header + "\n")
        for suffix in PARTS:
            if part(self._prefix, suffix).is_dir():
                raise ValueError(f"store {self._prefix}: {part(self._prefix, suffix)} is a directory")
        # Without a header there is no store: the old one is gone before its parts are replaced.
        part(self._prefix, "json").unlink(missing_ok=True)
        for suffix in PARTS:
            os.replace(part(self._building, suffix), part(self._prefix, suffix))

    def _header(self) -> StoreHeader:
        renderer = self._renderer
        inserted = (renderer.opening_ids, renderer.marker(MARKER_TEXT), renderer.note(NOTE_TEXT))
        self._hash.update(json.dumps(inserted).encode())
        return StoreHeader(
            version=FORMAT_VERSION,
            renderer=renderer.format.name,
            tokenizer_sha256=renderer.fingerprint,
            vocab_size=renderer.vocab_size,
            opening_ids=inserted[0],
            marker_ids=inserted[1],
            note_ids=inserted[2],
            trajectories=self.trajectories,
            tokens=self._tokens,
            trained_tokens=self._trained,
            content_sha256=self._hash.hexdigest(),
        )


def _label(trajectory: Trajectory) -> TrajectoryLabel:
    labels = tuple(
        TurnLabel(turn.action.context_only, tuple(call.name for call in turn.action.tool_calls))
        for turn in turns(trajectory.messages)
    )
    return TrajectoryLabel(
        trajectory.id, trajectory.task_id, trajectory.reward, _marked_turns(trajectory), labels
    )


def _marked_turns(trajectory: Trajectory) -> int | None:
    """How many whole turns the first ``prefix_messages`` messages cover."""
    if trajectory.prefix_messages is None:
        return None
    end = len(initial_messages(trajectory.messages))
    ends = [end]
    for turn in turns(trajectory.messages):
        end += 1 + len(turn.answer)
        ends.append(end)
    if trajectory.prefix_messages not in ends:
        raise ValueError(
            f"trajectory {trajectory.id!r}: prefix_messages={trajectory.prefix_messages} must end "
            f"the initial messages or a whole turn, such as {ends[:3]}"
        )
    return ends.index(trajectory.prefix_messages)


class TokenStore:
    """A complete store, opened for reading; tokens and mask are memory-mapped."""

    def __init__(self, prefix: Path) -> None:
        """Raises ValueError where the store is missing, incomplete, damaged or of another version."""
        self.prefix = prefix
        self.header = read_header(prefix)
        for suffix in PARTS:
            if not part(prefix, suffix).is_file():
                raise ValueError(f"store {prefix}: {part(prefix, suffix).name} is missing; tokenize again")
        try:
            self._index = IndexedDataset(str(prefix))
        except Exception as error:  # Megatron asserts, numpy and struct have errors of their own
            raise ValueError(
                f"store {prefix}: {part(prefix, 'idx').name} is damaged; tokenize again"
            ) from error
        lengths = self._index.sequence_lengths
        stored = part(prefix, "bin").stat().st_size // self._index.index.dtype_size
        masked = part(prefix, "mask").stat().st_size
        if not int(lengths.sum()) == self.header.tokens == stored == masked:
            raise ValueError(
                f"store {prefix}: header says {self.header.tokens} tokens, .idx {int(lengths.sum())}, "
                f".bin {stored}, .mask {masked}; a file is truncated or of another store, tokenize again"
            )
        self._mask = (
            np.memmap(part(prefix, "mask"), dtype=np.uint8, mode="r") if masked else np.empty(0, np.uint8)
        )
        self._starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return self.header.trajectories

    @cached_property
    def labels(self) -> tuple[TrajectoryLabel, ...]:
        """The trajectory list."""
        file = part(self.prefix, "trajectories.jsonl")
        try:
            with file.open(encoding="utf-8") as lines:
                labels = tuple(_parse_label(json.loads(line)) for line in lines)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store {self.prefix}: {file.name} is damaged; tokenize again") from error
        blocks = np.diff(self._index.document_indices).tolist()
        if [2 * len(label.turns) + 1 for label in labels] != blocks:
            raise ValueError(f"store {self.prefix}: {file.name} does not fit the tokens; tokenize again")
        return labels

    def lengths(self, number: int) -> np.ndarray:
        """Block lengths of a trajectory: initial, then action and answer of every turn."""
        first, last = self._index.document_indices[number : number + 2]
        return self._index.sequence_lengths[first:last]

    def trajectory(self, number: int) -> StoredTrajectory:
        """All of one trajectory."""
        first, last = (int(bound) for bound in self._index.document_indices[number : number + 2])
        start, stop = int(self._starts[first]), int(self._starts[last])
        width = self._index.index.dtype_size
        tokens = self._index.bin_reader.read(
            dtype=self._index.index.dtype, count=stop - start, offset=start * width
        )
        return StoredTrajectory(
            label=self.labels[number],
            tokens=tokens,
            mask=self._mask[start:stop],
            bounds=self._starts[first : last + 1] - start,
        )

    def find(self, trajectory_id: str) -> int:
        """The number of a trajectory by its id."""
        for number, label in enumerate(self.labels):
            if label.id == trajectory_id:
                return number
        raise ValueError(f"store {self.prefix}: no trajectory {trajectory_id!r} ({len(self)} others)")

    def __iter__(self) -> Iterator[StoredTrajectory]:
        return (self.trajectory(number) for number in range(len(self)))


def _parse_label(raw: dict[str, Any]) -> TrajectoryLabel:
    labels = tuple(TurnLabel(turn["context_only"], tuple(turn["tools"])) for turn in raw.pop("turns"))
    return TrajectoryLabel(**raw, turns=labels)
