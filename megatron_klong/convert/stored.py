"""What a Megatron distributed checkpoint of the model holds, in Hugging Face terms.

The weight map names the tensors of a *model*; a distributed checkpoint has them under keys of its
own: all experts of a layer in one tensor, and the norms that Transformer Engine fuses with the linear
layer behind them under those names, so that one checkpoint serves every layer spec. This module is the
whole difference.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.weight_map import HfTensor, Rule, weight_rules
from megatron_klong.model.weights import WeightSource

ExpertLayout = Literal["per-expert", "fused"]
"""How a Hugging Face checkpoint holds routed experts: a tensor for each, or one for all of a layer."""

_FUSED_NORM = "self_attention.linear_qkv.layer_norm_weight"
_FUSED_DENSE_NORM = "mlp.linear_fc1.layer_norm_weight"
_LOCAL_EXPERT = re.compile(r"\.local_experts\.\d+\.")
_HF_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        key: its name there.
        rules: the rule that makes it; of an expert tensor, the rules of all experts in order.
        stacked: whether the experts are stacked along a leading dimension.
    """

    key: str
    rules: tuple[Rule, ...]
    stacked: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in the checkpoint."""
        one = self.rules[0].shape
        return (len(self.rules), *one) if self.stacked else one

    def hf_tensors(self, layout: ExpertLayout) -> tuple[HfTensor, ...]:
        """The Hugging Face tensors it consists of, in the order of :meth:`split`."""
        if self.stacked and layout == "fused":
            return (HfTensor(self._fused_name(), self.shape),)
        return tuple(part for rule in self.rules for part in rule.hf)

    def split(self, full: Tensor, layout: ExpertLayout) -> list[Tensor]:
        """The Hugging Face tensors of a whole stored tensor; views where the map allows."""
        if self.stacked and layout == "fused":
            return [full]
        slices = full.unbind(0) if self.stacked else (full,)
        return [part for rule, one in zip(self.rules, slices) for part in rule.join.split(one)]

    def join(self, source: WeightSource) -> Tensor:
        """The whole stored tensor from Hugging Face tensors."""
        slices = [rule.join.join([source(part) for part in rule.hf]) for rule in self.rules]
        return torch.stack(slices) if self.stacked else slices[0]

    def _fused_name(self) -> str:
        name = self.rules[0].hf[0].name
        kind = "down_proj" if ".down_proj." in name else "gate_up_proj"
        return _HF_EXPERT.sub(f".experts.{kind}", name)


def stored_tensors(config: DecoderConfig) -> list[StoredTensor]:
    """Everything a checkpoint of the model holds, in the order of the map: layer by layer."""
    by_layer = groupby(weight_rules(config).values(), key=lambda rule: rule.megatron.split(".")[:3])
    return [stored for _, rules in by_layer for stored in _of_one_layer(list(rules))]


def _of_one_layer(rules: Sequence[Rule]) -> list[StoredTensor]:
    is_dense = any(rule.megatron.endswith("mlp.linear_fc1.weight") for rule in rules)
    grouped: dict[str, list[Rule]] = {}
    for rule in rules:
        grouped.setdefault(_key(rule.megatron, is_dense), []).append(rule)
    return [
        StoredTensor(key, tuple(same), stacked=".experts.experts." in key) for key, same in grouped.items()
    ]


def _key(megatron: str, is_dense: bool) -> str:
    layer = megatron.removesuffix(".input_layernorm.weight")
    if layer != megatron:
        return f"{layer}.{_FUSED_NORM}"
    layer = megatron.removesuffix(".pre_mlp_layernorm.weight")
    if layer != megatron and is_dense:
        return f"{layer}.{_FUSED_DENSE_NORM}"
    return _LOCAL_EXPERT.sub(".experts.", megatron)
