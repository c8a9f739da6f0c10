"""Two checkpoints, of whichever kind, tensor by tensor and bit by bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_klong.convert.checkpoint_reader import CheckpointReader
from megatron_klong.convert.folders import OnBytes, checkpoint_folder
from megatron_klong.convert.hf_folder import HfFolder, bitwise_equal
from megatron_klong.convert.stored import Piece, StoredTensor, stored_tensors
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.hf_config import load_hf_config


class Weights(Protocol):
    """Where weights are read from, as parts of Hugging Face tensors."""

    @property
    def folder(self) -> Path: ...

    def check(self, config: DecoderConfig) -> dict[str, int]:
        """Names and shapes against the config; counts of what is left out.

        Raises ValueError, which names the first that does not fit.
        """
        ...

    def dtype(self, tensor: StoredTensor) -> torch.dtype: ...

    def read(self, tensor: StoredTensor, piece: Piece) -> list[tuple[str, Tensor]]: ...


@dataclass(frozen=True)
class HfWeights:
    """Of a Hugging Face folder."""

    held: HfFolder

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.held.path

    def check(self, config: DecoderConfig) -> dict[str, int]:
        """See :class:`Weights`."""
        return self.held.check(config)

    def dtype(self, tensor: StoredTensor) -> torch.dtype:
        """Of the first tensor it is made of."""
        return self.held.dtype(tensor.rules[0].hf[0].name)

    def read(self, tensor: StoredTensor, piece: Piece) -> list[tuple[str, Tensor]]:
        """As they stand in the folder: nothing is joined and split again."""
        rules = tensor.rules[piece.start : piece.stop] if tensor.stacked else tensor.rules
        parts = [(hf.name, self.held.weights(hf)) for rule in rules for hf in rule.hf]
        if tensor.is_same:
            return [(name, whole[piece.start : piece.stop]) for name, whole in parts]
        return parts


@dataclass(frozen=True)
class MegatronWeights:
    """Of a distributed checkpoint."""

    reader: CheckpointReader

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.reader.folder

    def check(self, config: DecoderConfig) -> dict[str, int]:
        """See :class:`Weights`."""
        return self.reader.check(stored_tensors(config))

    def dtype(self, tensor: StoredTensor) -> torch.dtype:
        """As stored."""
        return self.reader.dtype(tensor.key)

    def read(self, tensor: StoredTensor, piece: Piece) -> list[tuple[str, Tensor]]:
        """Split as an export would."""
        return tensor.split(piece, self.reader.read(tensor.key, piece), "per-expert")


@dataclass(frozen=True)
class Difference:
    """A tensor that is not the same in both.

    Attributes:
        name: in Hugging Face's terms.
        largest: absolute difference of two elements.
        dtypes: of both.
    """

    name: str
    largest: float
    dtypes: tuple[str, str]


@dataclass(frozen=True)
class WeightComparison:
    """All tensors of two checkpoints.

    Attributes:
        tensors, bytes: that were compared.
        differences: tensors with other bits, in the order of the model.
        left_out: of each side, tensors that were not looked at, by reason.
    """

    tensors: int
    bytes: int
    differences: tuple[Difference, ...]
    left_out: tuple[dict[str, int], dict[str, int]]


def is_hf_folder(folder: Path) -> bool:
    """Whether a folder holds a Hugging Face checkpoint; else it is to be one of Megatron's."""
    return any(folder.glob("*.safetensors"))


def open_weights(folder: Path) -> tuple[Weights, DecoderConfig]:
    """A Hugging Face folder, a checkpoint, or the newest checkpoint of a run directory.

    Raises:
        ValueError: neither is there, or it has no config.
    """
    if is_hf_folder(folder):
        return HfWeights(HfFolder(folder)), load_hf_config(folder)
    checkpoint = checkpoint_folder(folder)
    return MegatronWeights(CheckpointReader(checkpoint)), load_hf_config(checkpoint)


def compare_weights(
    one: Path, two: Path, *, on_bytes: OnBytes = lambda done, total: None
) -> WeightComparison:
    """Compare names and shapes with the config, and then all bits, in pieces.

    Args:
        on_bytes: called after every piece, with the bytes compared and those of all tensors.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen in one of them, or the two are models of other
            shapes; the message names what.
    """
    (first, config), (second, other) = open_weights(one), open_weights(two)
    _same_shape(first.folder, config, second.folder, other)
    left_out = first.check(config), second.check(config)
    stored = stored_tensors(config)
    total = sum(math.prod(tensor.shape) * first.dtype(tensor).itemsize for tensor in stored)
    found: dict[str, Difference] = {}
    names: set[str] = set()
    done = 0
    for tensor in stored:
        kinds = (str(first.dtype(tensor)), str(second.dtype(tensor)))
        for piece in tensor.pieces(first.dtype(tensor).itemsize):
            for (name, ours), (_, theirs) in zip(
                first.read(tensor, piece), second.read(tensor, piece), strict=True
            ):
                names.add(name)
                done += ours.nbytes
                if ours.dtype != theirs.dtype or not bitwise_equal(ours, theirs):
                    found[name] = _difference(name, ours, theirs, kinds, found.get(name))
            on_bytes(done, total)
    return WeightComparison(len(names), done, tuple(found.values()), left_out)


def _difference(
    name: str, ours: Tensor, theirs: Tensor, kinds: tuple[str, str], before: Difference | None
) -> Difference:
    rows: Iterator[tuple[Tensor, Tensor]] = zip(ours.split(4096), theirs.split(4096))
    largest = max(float((a.double() - b.double()).abs().max()) for a, b in rows)
    return Difference(name, max(largest, before.largest if before else 0.0), kinds)


def _same_shape(one: Path, config: DecoderConfig, two: Path, other: DecoderConfig) -> None:
    ours, theirs = asdict(config), asdict(other)
    differing: Sequence[str] = [name for name in ours if ours[name] != theirs[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"models of other shapes: {name} is {ours[name]!r} in {one} and {theirs[name]!r} in {two}"
        )
