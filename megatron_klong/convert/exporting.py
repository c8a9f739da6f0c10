"""Megatron distributed checkpoint -> Hugging Face folder, at most one stored tensor in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_klong.convert.folders import ConversionReport, checkpoint_folder, complete_or_absent
from megatron_klong.convert.safetensors_file import Entry, SafetensorsWriter
from megatron_klong.convert.stored import ExpertLayout, StoredTensor, stored_tensors
from megatron_klong.model.hf_config import config_json, load_hf_config

SHARD_BYTES = 5_000_000_000
_COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
               "generation_config.json")  # fmt: skip


def export_checkpoint(
    source: Path,
    target: Path,
    *,
    hf_config: Path | None = None,
    tokenizer: Path | None = None,
    layout: ExpertLayout = "per-expert",
    shard_bytes: int = SHARD_BYTES,
    on_tensor: Callable[[], None] = lambda: None,
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
        on_tensor: called after every Hugging Face tensor.

    Raises:
        ValueError: a missing, unknown or misshapen tensor, named, before anything is written.
    """
    folder = checkpoint_folder(source)
    config_file = _config_file(hf_config or folder)
    reader = CheckpointReader(folder)
    stored = stored_tensors(load_hf_config(config_file))
    left_out = reader.check(stored)
    entries = {
        tensor.key: [Entry(hf.name, hf.shape, reader.dtype(tensor.key)) for hf in tensor.hf_tensors(layout)]
        for tensor in stored
    }
    shards = _cut([entry for each in entries.values() for entry in each], shard_bytes)
    with complete_or_absent(target) as unfinished:
        _write_shards(unfinished, shards, reader, stored, layout, on_tensor)
        _write_config(config_file, unfinished, reader.dtype(stored[0].key))
        for name in _COMPANIONS if tokenizer else ():
            assert tokenizer is not None
            if (tokenizer / name).is_file():
                shutil.copy(tokenizer / name, unfinished / name)
    written = [entry for shard in shards for entry in shard]
    return ConversionReport(folder, target, len(written), sum(e.nbytes for e in written), left_out)


@dataclass(frozen=True)
class CheckpointReader:
    """Reads single tensors, whole, of a distributed checkpoint saved at any layout."""

    folder: Path

    @cached_property
    def metadata(self) -> Metadata:
        """What the checkpoint says of itself."""
        return FileSystemReader(self.folder).read_metadata()

    def check(self, stored: Sequence[StoredTensor]) -> dict[str, int]:
        """Compare names and shapes with what the model wants; counts of what is left out.

        Raises:
            ValueError: names the first tensor that does not fit.
        """
        held = self.metadata.state_dict_metadata
        for tensor in stored:
            found = held.get(tensor.key)
            if not isinstance(found, TensorStorageMetadata):
                raise ValueError(f"{self.folder}: tensor {tensor.key!r} is missing")
            if tuple(found.size) != tensor.shape:
                raise ValueError(
                    f"{self.folder}: tensor {tensor.key!r} has shape {tuple(found.size)}, the config "
                    f"wants {tensor.shape}"
                )
        keys = {tensor.key for tensor in stored}
        others = [key for key, kind in held.items() if isinstance(kind, TensorStorageMetadata)]
        unknown = [key for key in others if key not in keys and not key.startswith("optimizer.")]
        if unknown:
            raise ValueError(f"{self.folder}: tensor {unknown[0]!r} is none of the config's model")
        rest = len(others) - len(stored)
        return {"optimizer state": rest} if rest else {}

    def dtype(self, key: str) -> torch.dtype:
        """Data type of a tensor."""
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        return found.properties.dtype

    def read(self, key: str) -> Tensor:
        """A whole tensor."""
        found = self.metadata.state_dict_metadata[key]
        assert isinstance(found, TensorStorageMetadata)
        state = {key: torch.empty(found.size, dtype=found.properties.dtype)}
        load(
            state, storage_reader=_KnownMetadata(self.folder, self.metadata), planner=DefaultLoadPlanner(),
            no_dist=True,
        )  # fmt: skip
        return state[key]


class _KnownMetadata(FileSystemReader):
    """A reader that does not read the metadata again for every tensor."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *_args: object, **_kwargs: object) -> Metadata:
        return self._metadata


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
    folder: Path, shards: Sequence[Sequence[Entry]], reader: CheckpointReader,
    stored: Sequence[StoredTensor], layout: ExpertLayout, on_tensor: Callable[[], None],
) -> None:  # fmt: skip
    names = [
        "model.safetensors" if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    tensors = (
        (hf.name, part)
        for tensor in stored
        for hf, part in zip(
            tensor.hf_tensors(layout), tensor.split(reader.read(tensor.key), layout), strict=True
        )
    )
    for name, shard in zip(names, shards):
        with SafetensorsWriter(folder / name, shard) as writer:
            while not writer.complete:
                writer.write(*next(tensors))
                on_tensor()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(entry.nbytes for shard in shards for entry in shard)},
            "weight_map": {entry.name: name for name, shard in zip(names, shards) for entry in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _write_config(config_file: Path, target: Path, dtype: torch.dtype) -> None:
    """The config with the data type of the weights, which the training precision may have changed."""
    raw = json.loads(config_file.read_text(encoding="utf-8"))
    raw.pop("torch_dtype", None)
    raw |= {"dtype": str(dtype).removeprefix("torch."), "architectures": ["Glm4MoeForCausalLM"]}
    (target / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
