"""The token store: every trajectory's tokens once, in blocks, in Megatron's own format.

``PREFIX.bin`` and ``PREFIX.idx`` are a Megatron indexed dataset: one document per trajectory, one sequence
per block (initial messages, then action and answer of every turn, in turn). ``PREFIX.marks`` holds one byte
per token: what it is a part of, and whether it carries loss. ``PREFIX.turns`` holds an int32 per turn: twice
the number of its tool set, plus 1 if it is context only. ``PREFIX.trajectories.jsonl`` names the
trajectories; ``PREFIX.tokenizer.json`` is the tokenizer. ``PREFIX.json`` is the header; it is written last,
so a store that has one is complete.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_klong.data.blocks import StoredTrajectory, TrajectoryLabel
from megatron_klong.data.header import PARTS, part, read_header
from megatron_klong.trajectory.render import Renderer, load_renderer


class TokenStore:
    """A complete store, opened for reading; everything of a size is memory-mapped."""

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
        self._width = self._index.index.dtype_size
        self._check_sizes()
        self._tokens = self._mapped("bin", self._index.index.dtype)
        self._marks = self._mapped("marks", np.uint8)
        self.turn_marks = self._mapped("turns", np.int32)
        """Of every turn of the store, int32: twice its tool set, plus 1 if it is context only."""
        if len(self.turn_marks) and not 0 <= self.turn_marks.max() // 2 < len(self.header.tool_sets):
            raise ValueError(
                f"store {prefix}: {part(prefix, 'turns').name} names tools that the header does not; "
                "tokenize again"
            )
        self._starts = np.concatenate([[0], np.cumsum(self.block_lengths, dtype=np.int64)])

    def __len__(self) -> int:
        return self.header.trajectories

    @property
    def block_lengths(self) -> np.ndarray:
        """Of all blocks of all trajectories, int32."""
        return self._index.sequence_lengths

    @property
    def first_blocks(self) -> np.ndarray:
        """Where each trajectory's blocks begin, int64, one more than trajectories."""
        return self._index.document_indices

    @cached_property
    def labels(self) -> tuple[TrajectoryLabel, ...]:
        """The trajectory list."""
        file = part(self.prefix, "trajectories.jsonl")
        try:
            with file.open(encoding="utf-8") as lines:
                labels = tuple(TrajectoryLabel(**json.loads(line)) for line in lines)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"store {self.prefix}: {file.name} is damaged; tokenize again") from error
        if len(labels) != len(self):
            raise ValueError(f"store {self.prefix}: {file.name} does not fit the tokens; tokenize again")
        return labels

    def lengths(self, number: int) -> np.ndarray:
        """Block lengths of a trajectory: initial, then action and answer of every turn."""
        first, last = self.first_blocks[number : number + 2]
        return self.block_lengths[first:last]

    def trajectory(self, number: int) -> StoredTrajectory:
        """All of one trajectory; views of the files."""
        first, last = (int(bound) for bound in self.first_blocks[number : number + 2])
        start, stop = int(self._starts[first]), int(self._starts[last])
        return StoredTrajectory(
            label=self.labels[number],
            tokens=self._tokens[start:stop],
            marks=self._marks[start:stop],
            bounds=self._starts[first : last + 1] - start,
        )

    def find(self, trajectory_id: str) -> int:
        """The number of a trajectory by its id."""
        for number, label in enumerate(self.labels):
            if label.id == trajectory_id:
                return number
        raise ValueError(f"store {self.prefix}: no trajectory {trajectory_id!r} ({len(self)} others)")

    def renderer(self) -> Renderer:
        """The renderer that the store was made with.

        Raises:
            ValueError: the tokenizer beside the store is not the one it was made with.
        """
        file = part(self.prefix, "tokenizer.json")
        renderer = load_renderer(self.header.renderer, file)
        if renderer.fingerprint != self.header.tokenizer_sha256:
            raise ValueError(
                f"store {self.prefix}: {file.name} is not the tokenizer that the store was made with; "
                "tokenize again"
            )
        return renderer

    def __iter__(self) -> Iterator[StoredTrajectory]:
        return (self.trajectory(number) for number in range(len(self)))

    def _check_sizes(self) -> None:
        tokens, turns = int(self.block_lengths.sum()), (len(self.block_lengths) - len(self)) // 2
        stored = part(self.prefix, "bin").stat().st_size // self._width
        marked = part(self.prefix, "marks").stat().st_size
        if not tokens == self.header.tokens == stored == marked:
            raise ValueError(
                f"store {self.prefix}: header says {self.header.tokens} tokens, .idx {tokens}, "
                f".bin {stored}, .marks {marked}; a file is truncated or of another store, tokenize again"
            )
        if part(self.prefix, "turns").stat().st_size != 4 * turns:
            raise ValueError(
                f"store {self.prefix}: .idx has {turns} turns, .turns another number; a file is truncated or "
                "of another store, tokenize again"
            )

    def _mapped(self, suffix: str, dtype: type[np.generic]) -> np.ndarray:
        file = part(self.prefix, suffix)
        if not file.stat().st_size:
            return np.empty(0, dtype)
        return np.memmap(file, dtype=dtype, mode="r").view(np.ndarray)  # slices of a memmap are slow to make
