"""Hugging Face folder -> Megatron distributed checkpoint, piece by piece.

In memory at a time: an expert, or 32 MB of a large matrix, or a layer's queries, keys and values, and the
parts they are joined from.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_klong.convert.checkpoint_writer import CheckpointWriter
from megatron_klong.convert.folders import ConversionReport, OnBytes, complete_or_absent
from megatron_klong.convert.hf_folder import HfFolder
from megatron_klong.convert.stored import StoredTensor, stored_tensors
from megatron_klong.model.hf_config import load_hf_config

_MEGATRON_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""What Megatron-Core 0.16 writes into ``metadata.json`` beside a torch distributed checkpoint."""


def import_checkpoint(
    source: Path, target: Path, *, on_bytes: OnBytes = lambda done, total: None
) -> ConversionReport:
    """Write Hugging Face weights as a distributed checkpoint that Megatron reads at any layout.

    Args:
        source: folder with ``config.json`` and safetensors, experts one by one or fused.
        target: folder to make; it appears under its name only when complete.
        on_bytes: called after every piece, with the bytes done and those of all tensors.

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
        done = 0
        with CheckpointWriter(unfinished) as writer:
            for key in _extra_states(stored):
                writer.add_object(key, [None])
            for tensor in stored:
                for piece in tensor.pieces(dtypes[tensor.key].itemsize):
                    rows = tensor.make(piece, folder.weights)
                    writer.add_rows(tensor.key, rows, piece.start, tensor.shape)
                    done += rows.nbytes
                    on_bytes(done, size)
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


def _extra_states(stored: Sequence[StoredTensor]) -> list[str]:
    """Keys of the empty state that Megatron's linear layers look for beside their weight.

    Megatron saves one object for each linear layer, and for each expert's; its key ends in the
    object's place in the grid of all of them, and the file holds a list, one item per rank's share.
    """
    states = []
    for tensor in stored:
        layer, _, kind = tensor.key.rpartition(".")
        if kind == "weight" and re.search(r"\.(linear_\w+|eh_proj)$", layer):
            count = len(tensor.rules)
            states += [f"{layer}._extra_state/shard_{number}_{count}" for number in range(count)]
    return states
