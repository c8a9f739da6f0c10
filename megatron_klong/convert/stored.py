"""What a Megatron distributed checkpoint of the model holds, in Hugging Face terms.

The weight map names the tensors of a *model*; a distributed checkpoint has them under keys of its
own: all experts of a layer in one tensor, and the norms that Transformer Engine fuses with the linear
layer behind them under those names, so that one checkpoint serves every layer spec. This module is the
whole difference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from torch import Tensor

from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.weight_map import HfTensor, Rule, Same, weight_rules
from megatron_klong.model.weights import WeightSource

PIECE_BYTES = 32 << 20
"""Large tensors are converted in pieces of about this size."""

ExpertLayout = Literal["per-expert", "fused"]
"""How a Hugging Face checkpoint holds routed experts: a tensor for each, or one for all of a layer."""

_FUSED_NORM = "self_attention.linear_qkv.layer_norm_weight"
_FUSED_DENSE_NORM = "mlp.linear_fc1.layer_norm_weight"
_LOCAL_EXPERT = re.compile(r"\.local_experts\.\d+\.")
_HF_EXPERT = re.compile(r"\.experts\.\d+\.(gate|up|down)_proj\.weight$")


@dataclass(frozen=True)
class Piece:
    """A part of a stored tensor along its first dimension: experts, or rows."""

    start: int
    stop: int


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

    @property
    def copies(self) -> tuple[HfTensor, ...]:
        """Hugging Face tensors that repeat it."""
        return self.rules[0].copies

    @property
    def is_same(self) -> bool:
        """Whether it is one Hugging Face tensor, unchanged, which can be converted row by row."""
        return not self.stacked and isinstance(self.rules[0].join, Same)

    def hf_tensors(self, layout: ExpertLayout) -> tuple[HfTensor, ...]:
        """The Hugging Face tensors it consists of, without its copies."""
        if self.stacked and layout == "fused":
            return (HfTensor(self._fused_name(), self.shape),)
        return tuple(part for rule in self.rules for part in rule.hf)

    def pieces(self, itemsize: int) -> list[Piece]:
        """What it can be made from one after the other: experts, rows of one tensor, or all at once.

        Args:
            itemsize: bytes of an element.
        """
        count = self.shape[0]
        if self.stacked:
            return [Piece(expert, expert + 1) for expert in range(count)]
        if not self.is_same:
            return [Piece(0, count)]
        step = max(1, PIECE_BYTES // max(1, math.prod(self.shape[1:]) * itemsize))
        return [Piece(start, min(start + step, count)) for start in range(0, count, step)]

    def make(self, piece: Piece, source: WeightSource) -> Tensor:
        """A piece from Hugging Face tensors."""
        if self.stacked:
            rule = self.rules[piece.start]
            return rule.join.join([source(part) for part in rule.hf]).unsqueeze(0)
        rule = self.rules[0]
        if self.is_same:
            return source(rule.hf[0])[piece.start : piece.stop]
        return rule.join.join([source(part) for part in rule.hf])

    def split(self, piece: Piece, tensor: Tensor, layout: ExpertLayout) -> list[tuple[str, Tensor]]:
        """A piece as Hugging Face tensors by name, or parts of them; views where the map allows."""
        if self.stacked and layout == "fused":
            return [(self._fused_name(), tensor)]
        if self.is_same:
            return [(self.rules[0].hf[0].name, tensor)]
        rules = self.rules[piece.start : piece.stop] if self.stacked else self.rules
        slices = tensor.unbind(0) if self.stacked else (tensor,)
        return [
            (hf.name, part)
            for rule, one in zip(rules, slices, strict=True)
            for hf, part in zip(rule.hf, rule.join.split(one), strict=True)
        ]

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
