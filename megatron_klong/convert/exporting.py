"""Megatron distributed checkpoint -> Hugging Face folder, piece by piece.

In memory at a time: an expert, or 32 MB of a large matrix, or a layer's queries, keys and values.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_klong.convert.checkpoint_reader import CheckpointReader
from megatron_klong.convert.folders import ConversionReport, OnBytes, checkpoint_folder, complete_or_absent
from megatron_klong.convert.safetensors_file import Entry, SafetensorsWriter
from megatron_klong.convert.stored import ExpertLayout, StoredTensor, stored_tensors
from megatron_klong.model.families import FAMILIES
from megatron_klong.model.hf_config import config_json, load_hf_config
from megatron_klong.model.weight_map import HfTensor

SHARD_BYTES = 5_000_000_000
_COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None = None,
    tokenizer: Path | None = None,
    layout: ExpertLayout = "per-expert",
    shard_bytes: int = SHARD_BYTES,
    on_bytes: OnBytes = lambda done, total: None,
) -> ConversionReport:
    """Write a checkpoint's weights as safetensors with ``config.json``, bit for bit.

    Args:
        source: a checkpoint, or a folder of ``step_*`` checkpoints (the newest is taken). It may
            have been saved at any parallel layout; optimizer state in it is left alone.
        target: folder to make; it appears under its name only when complete.
        hf_config: ``config.json`` to use where the checkpoint has none.
        tokenizer: folder whose tokenizer files are copied beside the weights.
        layout: routed experts one by one, or fused per layer.
        shard_bytes: largest size of a file, unless a single tensor is larger.
        on_bytes: called after every piece, with the bytes done and those of all tensors.

    Raises:
        ValueError: a missing, unknown or misshapen tensor, named, before anything is written.
    """
    folder = checkpoint_folder(source)
    config_file = _config_file(hf_config or folder)
    reader = CheckpointReader(folder)
    stored = stored_tensors(load_hf_config(config_file))
    left_out = reader.check(stored)
    entries = [
        Entry(hf.name, hf.shape, reader.dtype(tensor.key))
        for tensor in stored
        for hf in (*tensor.hf_tensors(layout), *_written_copies(tensor))
    ]
    companions = _tokenizer_files(tokenizer) if tokenizer is not None else []
    size = sum(entry.nbytes for entry in entries)
    with complete_or_absent(target, size) as unfinished:
        parts = _counted(_parts(reader, stored, layout), size, on_bytes)
        _write_shards(unfinished, _cut(entries, shard_bytes), parts)
        _write_config(config_file, unfinished, reader.dtype(stored[0].key))
        for file in companions:
            shutil.copy(file, unfinished / file.name)
    return ConversionReport(folder, target, len(entries), size, left_out)


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in _COMPANIONS if (folder / name).is_file()]
    if not files:
        raise ValueError(f"--tokenizer {folder}: has none of {', '.join(_COMPANIONS)}")
    return files


def _config_file(place: Path) -> Path:
    file = config_json(place)
    if not file.is_file():
        raise ValueError(f"{place} has no config.json; name the model's own with --hf-config")
    return file


def _cut(entries: Sequence[Entry], most: int) -> list[list[Entry]]:
    """Neighbours together in files of at most ``most`` bytes."""
    shards: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > most:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return shards


def _write_shards(
    folder: Path, shards: Sequence[Sequence[Entry]], parts: Iterator[tuple[str, Tensor]]
) -> None:
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    for name, shard in zip(names, shards):
        with SafetensorsWriter(folder / name, shard) as writer:
            while not writer.complete:
                writer.write(*next(parts))
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard)},
            "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _parts(
    reader: CheckpointReader, stored: Sequence[StoredTensor], layout: ExpertLayout
) -> Iterator[tuple[str, Tensor]]:
    """Everything that is written, in its order: tensors, or one after the other the rows of one."""
    for tensor in stored:
        pieces = tensor.pieces(reader.dtype(tensor.key).itemsize)
        for piece in pieces:
            yield from tensor.split(piece, reader.read(tensor.key, piece), layout)
        for copy in _written_copies(tensor):
            for piece in pieces:
                yield copy.name, reader.read(tensor.key, piece)


def _counted(
    parts: Iterator[tuple[str, Tensor]], size: int, on_bytes: OnBytes
) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, part in parts:
        done += part.nbytes
        yield name, part
        on_bytes(done, size)


def _written_copies(tensor: StoredTensor) -> tuple[HfTensor, ...]:
    return tensor.copies if tensor.rules[0].writes_copies else ()


def _write_config(config_file: Path, target: Path, dtype: torch.dtype) -> None:
    """The config with the data type of the weights, which the training precision may have changed."""
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    raw.pop("torch_dtype", None)
    architecture = FAMILIES[raw["model_type"]].architecture
    raw |= {"dtype": str(dtype).removeprefix("torch."), "architectures": [architecture]}
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
