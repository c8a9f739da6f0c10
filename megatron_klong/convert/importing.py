"""Hugging Face folder -> Megatron distributed checkpoint, piece by piece.

In memory at a time: an expert, or 128 MB of a large matrix, or a layer's queries, keys and values, and the
parts they are joined from.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_klong.convert.folders import ConversionReport, complete_or_absent
from megatron_klong.convert.hf_folder import HfFolder
from megatron_klong.convert.stored import Piece, StoredTensor, stored_tensors
from megatron_klong.model.hf_config import load_hf_config

_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core 0.16 writes into ``metadata.json`` beside a torch distributed checkpoint."""


def import_checkpoint(
    source: Path, target: Path, *, on_tensor: Callable[[], None] = lambda: None
) -> ConversionReport:
    """Write Hugging Face weights as a distributed checkpoint that Megatron reads at any layout.

    Args:
        source: folder with ``config.json`` and safetensors, experts one by one or fused.
        target: folder to make; it appears under its name only when complete.
        on_tensor: called after every stored tensor.

    Raises:
        ValueError: a missing, unknown or misshapen tensor, named, before anything is written.
    """
    config = load_hf_config(source)
    stored = stored_tensors(config)
    folder = HfFolder(source)
    left_out = folder.check(config)
    dtypes = {tensor.key: _common_dtype(folder, tensor) for tensor in stored}
    size = sum(math.prod(tensor.shape) * dtypes[tensor.key].itemsize for tensor in stored)
    with complete_or_absent(target, size) as unfinished:
        save(
            _extra_states(stored),
            # With no copying ahead, a piece is made only when its turn to be written comes.
            storage_writer=FileSystemWriter(unfinished, thread_count=1, per_thread_copy_ahead=0),
            planner=_MakeWhenWritten(stored, dtypes, folder, on_tensor),
            no_dist=True,
        )
        torch.save({}, unfinished / "common.pt")
        (unfinished / "metadata.json").write_text(json.dumps(_MEGATRON_FORMAT))
        shutil.copy(source / "config.json", unfinished / "config.json")
    return ConversionReport(source, target, len(stored), size, left_out)


def _common_dtype(folder: HfFolder, tensor: StoredTensor) -> torch.dtype:
    """The data type of all parts; joining different ones would change bits."""
    parts = [part.name for rule in tensor.rules for part in rule.hf]
    first = folder.dtype(parts[0])
    for name in parts:
        if folder.dtype(name) != first:
            raise ValueError(
                f"{folder.path}: tensor {name!r} is {folder.dtype(name)}, but {parts[0]!r}, which Megatron "
                f"holds in one tensor with it, is {first}"
            )
    return first


class _MakeWhenWritten(DefaultSavePlanner):
    """Makes each piece of a stored tensor from its Hugging Face parts when the writer asks for its data."""

    def __init__(
        self,
        stored: Sequence[StoredTensor],
        dtypes: Mapping[str, torch.dtype],
        folder: HfFolder,
        on_tensor: Callable[[], None],
    ) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._stored = {tensor.key: tensor for tensor in stored}
        self._dtypes = dtypes
        self._folder = folder
        self._on_tensor = on_tensor

    def create_local_plan(self) -> SavePlan:
        """The default plan for the objects, and a shard for each piece of a tensor."""
        pieces = [item for tensor in self._stored.values() for item in self._write_items(tensor)]
        plan = replace(super().create_local_plan(), items=[*super().create_local_plan().items, *pieces])
        self.plan = plan
        return plan

    def _write_items(self, tensor: StoredTensor) -> list[WriteItem]:
        dtype, size = self._dtypes[tensor.key], torch.Size(tensor.shape)
        items = []
        for piece in tensor.pieces(dtype.itemsize):
            offsets = torch.Size([piece.start, *[0] * (len(size) - 1)])
            chunk = ChunkStorageMetadata(offsets, torch.Size([piece.stop - piece.start, *size[1:]]))
            data = TensorWriteData(chunk, TensorProperties(dtype=dtype), size)
            items.append(WriteItem(MetadataIndex(tensor.key, offsets), WriteItemType.SHARD, tensor_data=data))
        return items

    def resolve_data(self, write_item: WriteItem) -> Any:
        """The bytes of an object, or a piece of a tensor."""
        if write_item.type is WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        tensor, data, offset = (
            self._stored[write_item.index.fqn],
            write_item.tensor_data,
            write_item.index.offset,
        )
        assert data is not None and offset is not None
        piece = Piece(offset[0], offset[0] + data.chunk.sizes[0])
        if piece.stop == tensor.shape[0]:
            self._on_tensor()
        return tensor.make(piece, self._folder.weights).contiguous()


def _extra_states(stored: Sequence[StoredTensor]) -> dict[str, list[None]]:
    """The empty state that Megatron's linear layers look for beside their weight.

    Megatron saves one object for each linear layer, and for each expert's; its key ends in the
    object's place in the grid of all of them, and the file holds a list, one item per rank's share.
    """
    states: dict[str, list[None]] = {}
    for tensor in stored:
        layer, _, kind = tensor.key.rpartition(".")
        if kind != "weight" or not re.search(r"\.(linear_\w+|eh_proj)$", layer):
            continue
        count = len(tensor.rules)
        for number in range(count):
            states[f"{layer}._extra_state/shard_{number}_{count}"] = [None]
    return states
