"""Where the weights of a model come from, and how a rank takes its part of them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.families import FAMILIES
from megatron_klong.model.row_model import RankModel
from megatron_klong.model.weight_map import HfTensor, take_shard, weight_rules

WeightSource = Callable[[HfTensor], Tensor]
"""Gives the full tensor for a name of the Hugging Face checkpoint."""

_LAYER = re.compile(r"model\.layers\.\d+\.")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.(?P<index>\d+)\.(?P<part>gate|up|down)_proj\.weight")


def random_weights(config: DecoderConfig, seed: int) -> WeightSource:
    """Fresh weights: normal with ``initializer_range``, norms one, biases zero.

    Each tensor has a generator of its own, seeded by its name, so that the model is the same at
    every parallel layout.
    """

    def source(tensor: HfTensor) -> Tensor:
        if tensor.name.endswith("norm.weight"):
            return torch.ones(tensor.shape)
        if tensor.name.endswith("bias"):
            return torch.zeros(tensor.shape)
        digest = hashlib.sha256(f"{seed}/{tensor.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.empty(tensor.shape).normal_(0.0, config.initializer_range, generator=generator)

    return source


def mapping_weights(tensors: Mapping[str, Tensor], origin: str) -> WeightSource:
    """Weights held by name, with experts one by one or fused (``experts.gate_up_proj``).

    Raises (when called): ValueError for a tensor that is missing or misshapen.
    """

    def source(tensor: HfTensor) -> Tensor:
        found = tensors[tensor.name] if tensor.name in tensors else _from_fused(tensors, tensor.name)
        if found is None:
            raise ValueError(f"{origin}: tensor {tensor.name!r} is missing")
        if tuple(found.shape) != tensor.shape:
            raise ValueError(
                f"{origin}: tensor {tensor.name!r} has shape {tuple(found.shape)}, "
                f"the config wants {tensor.shape}"
            )
        return found

    return source


def safetensors_weights(folder: Path) -> WeightSource:
    """Weights of a Hugging Face folder, each tensor read (mapped) when it is asked for."""
    return file_weights(open_safetensors(folder), str(folder))


def file_weights(files: dict[str, Any], origin: str) -> WeightSource:
    """The same of files that :func:`open_safetensors` has opened."""
    return mapping_weights(_LazyTensors(files), origin)


def check_known(folder: Path, config: DecoderConfig) -> None:
    """Refuse a folder with tensors that the config's model does not have: it would be another model.

    Raises:
        ValueError: names the first of them.
    """
    held = open_safetensors(folder).keys()
    known = {part.name for rule in weight_rules(config).values() for part in (*rule.hf, *rule.copies)}
    fused = {_fused_name(match) for name in known if (match := _EXPERT.fullmatch(name))}
    unknown = held - known - fused
    unknown -= unused_prediction(unknown, config)
    if unknown:
        raise ValueError(f"{folder}: tensor {min(unknown)!r} is none of the config's model")


def unused_prediction(names: Set[str], config: DecoderConfig) -> set[str]:
    """Tensors of prediction layers among names, of a model whose config says that it has none."""
    if config.prediction_layers or "num_nextn_predict_layers" not in FAMILIES[config.family].defaults:
        return set()
    layers = {match[0] for name in names if (match := _LAYER.match(name))}
    unused = {layer for layer in layers if f"{layer}eh_proj.weight" in names}
    return {name for name in names if (match := _LAYER.match(name)) and match[0] in unused}


def open_safetensors(folder: Path) -> dict[str, Any]:
    """The opened file of each tensor of a Hugging Face folder.

    ``model.safetensors``, or what ``model.safetensors.index.json`` names, or every file.

    Raises:
        ValueError: no file, one that is missing, damaged or cut short, or a tensor that is in two.
    """
    from safetensors import SafetensorError, safe_open

    files: dict[str, Any] = {}
    for path in _safetensors_files(folder):
        try:
            opened = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: missing, damaged or cut short: {error}") from error
        for name in opened.keys():  # noqa: SIM118
            if name in files:
                raise ValueError(f"{folder}: tensor {name!r} is in two files; remove those of another save")
            files[name] = opened
    return files


def _safetensors_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise ValueError(f"{index}: cannot be read: {type(error).__name__}: {error}") from error
        return [folder / name for name in sorted(named)]
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise ValueError(f"{folder}: no *.safetensors here")
    return found


class _LazyTensors(Mapping[str, Tensor]):
    """A mapping over opened safetensors files that reads a tensor on look-up."""

    def __init__(self, files: dict[str, Any]) -> None:
        self._files = files

    def __getitem__(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files


def _from_fused(tensors: Mapping[str, Tensor], name: str) -> Tensor | None:
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    down, fused = match["part"] == "down", _fused_name(match)
    if fused not in tensors:
        return None
    expert = tensors[fused][int(match["index"])]
    return expert if down else expert.chunk(2, dim=0)[match["part"] == "up"]


def _fused_name(expert: re.Match[str]) -> str:
    return f"{expert['experts']}.{'down' if expert['part'] == 'down' else 'gate_up'}_proj"


def rank_tensors(model: RankModel) -> dict[str, Tensor]:
    """Parameters and saved buffers of this rank by the map's names."""
    persistent = model.state_dict(keep_vars=True)
    return by_global_name(
        model, {name: value for name, value in persistent.items() if isinstance(value, Tensor)}
    )


def by_global_name(model: RankModel, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of this rank, which have the names of its parameters, by the map's names.

    Layer and expert numbers, which Megatron counts from 0 in every pipeline stage and on every expert
    rank, are made global, and stacked experts are given one by one (as views).
    """
    return {
        _global_name(model, one): part
        for name, tensor in tensors.items()
        for one, part in _unstacked(name, tensor).items()
    }


def _unstacked(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """A rank's tensor by the name it has, or the experts that are stacked in it, one by one (views)."""
    if ".experts." not in name or tensor.dim() < 3:
        return {name: tensor}
    above, _, layer = name.partition(".experts.")
    return {
        f"{above}.experts.local_experts.{number}.{layer}": part for number, part in enumerate(tensor.detach())
    }


def _global_name(rank_model: RankModel, numbered: str) -> str:
    stage, _, name = numbered.partition(".")
    model = rank_model[int(stage)]
    if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"  # a later stage's copy
    parts = canonical_name(name).split(".")
    if parts[:2] == ["decoder", "layers"]:
        layer = model.decoder.layers[int(parts[2])]
        parts[2] = str(layer.layer_number - 1)
    elif parts[:2] == ["mtp", "layers"]:
        layer = model.mtp.layers[int(parts[2])].transformer_layer
    if "local_experts" in parts:
        place = parts.index("local_experts") + 1
        parts[place] = str(layer.mlp.local_expert_indices[int(parts[place])])
    return ".".join(parts)


def canonical_name(name: str) -> str:
    """The map's name of a parameter that Transformer Engine's layers name otherwise.

    Its linear layers hold the norm before them, and its grouped experts a numbered weight each.
    """
    name = name.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
    name = name.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
    return re.sub(r"\.experts\.(linear_fc[12])\.weight(\d+)$", r".experts.local_experts.\2.\1.weight", name)


@torch.no_grad()
def load_weights(
    model: RankModel,
    config: DecoderConfig,
    source: WeightSource,
    on_tensor: Callable[[], None] = lambda: None,
) -> None:
    """Fill this rank's part of the model from full tensors, at any TP, PP and EP.

    Args:
        on_tensor: called after each of the model's tensors.
    """
    rules = weight_rules(config)
    tp_group = model[0].pg_collection.tp
    for name, tensor in rank_tensors(model).items():
        rule = rules[name]
        full = rule.join.join([source(part) for part in rule.hf])
        tensor.copy_(take_shard(rule.shard, full, tp_group.rank(), tp_group.size()))
        on_tensor()
