"""The declarative map between Hugging Face and Megatron-Core weights.

Read as a table: each :class:`Rule` names one Megatron tensor (with global layer and expert
numbers), the Hugging Face tensors it is made of, how they are joined, and how tensor-parallel
ranks share it. Loading, initialisation, conversion and weight sync all walk this one table. The
families name their tensors alike; what a model has is said by its :class:`DecoderConfig`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from megatron_klong.model.decoder import DecoderConfig, MoeConfig


class Join(Protocol):
    """How Hugging Face tensors form one full Megatron tensor; ``split`` is the exact inverse."""

    def join(self, parts: Sequence[Tensor]) -> Tensor: ...

    def split(self, full: Tensor) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Same:
    """One tensor, unchanged."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        (only,) = parts
        return only

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        return (full,)


@dataclass(frozen=True)
class GateUp:
    """``fc1 = [gate; up]`` along the rows."""

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(parts), dim=0)

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        gate, up = full.chunk(2, dim=0)
        return gate, up


@dataclass(frozen=True)
class GroupedQKV:
    """Query, key and value rows interleaved per KV group: ``q .. q k v | q .. q k v | ...``."""

    groups: int
    queries_per_group: int
    head_dim: int

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        shape = (self.groups, -1, self.head_dim, *parts[0].shape[1:])
        grouped = torch.cat([part.reshape(shape) for part in parts], dim=1)
        return grouped.flatten(0, 2)

    def split(self, full: Tensor) -> tuple[Tensor, ...]:
        shape = (self.groups, self.queries_per_group + 2, self.head_dim, *full.shape[1:])
        pieces = full.reshape(shape).split([self.queries_per_group, 1, 1], dim=1)
        return tuple(piece.flatten(0, 2) for piece in pieces)


class Shard(Protocol):
    """Which part of the full Megatron tensor a tensor-parallel rank holds.

    Given as views of the full tensor, which the rank holds one after the other along the rows: so
    the same rule takes a shard out and puts it back.
    """

    def views(self, full: Tensor, rank: int, size: int) -> tuple[Tensor, ...]: ...


@dataclass(frozen=True)
class Replicated:
    """Every rank holds the whole tensor."""

    def views(self, full: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return (full,)


@dataclass(frozen=True)
class Along:
    """Equal slices along one dimension."""

    dim: int

    def views(self, full: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return (full.chunk(size, dim=self.dim)[rank],)


@dataclass(frozen=True)
class GatedRows:
    """Equal slices of gate and of up, joined again: each rank can apply SwiGLU on its own."""

    def views(self, full: Tensor, rank: int, size: int) -> tuple[Tensor, ...]:
        return tuple(half.chunk(size, dim=0)[rank] for half in full.chunk(2, dim=0))


def take_shard(shard: Shard, full: Tensor, rank: int, size: int) -> Tensor:
    """What rank ``rank`` of ``size`` holds of a full tensor."""
    views = shard.views(full, rank, size)
    return views[0] if len(views) == 1 else torch.cat(views, dim=0)


def put_shard(shard: Shard, full: Tensor, part: Tensor, rank: int, size: int) -> None:
    """Write what rank ``rank`` of ``size`` holds into its place in the full tensor."""
    views = shard.views(full, rank, size)
    for view, rows in zip(views, part.split([view.shape[0] for view in views]), strict=True):
        view.copy_(rows)


@dataclass(frozen=True)
class HfTensor:
    """Name and shape of a tensor of the Hugging Face checkpoint (per-expert layout)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Rule:
    """One row of the map.

    Attributes:
        megatron: the Megatron parameter or buffer, with global layer and expert numbers.
        hf: what it is made of, in the order ``join`` takes.
        join: how the parts form the full tensor.
        shard: what a tensor-parallel rank holds of it. Expert weights are never sharded: the
            expert tensor-parallel size is 1.
        copies: Hugging Face tensors that repeat the first one. A checkpoint may lack them; what it has of
            them must be equal.
        writes_copies: whether a published checkpoint has them.
    """

    megatron: str
    hf: tuple[HfTensor, ...]
    join: Join = Same()
    shard: Shard = Replicated()
    copies: tuple[HfTensor, ...] = ()
    writes_copies: bool = False

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the full Megatron tensor."""
        return tuple(self.join.join([torch.empty(part.shape, device="meta") for part in self.hf]).shape)


def weight_rules(config: DecoderConfig) -> dict[str, Rule]:
    """The whole map of a model, by global Megatron name."""
    return {rule.megatron: rule for rule in _rules(config)}


def is_prediction(rule: Rule) -> bool:
    """Whether a tensor belongs to a multi-token prediction layer, which servers load apart."""
    return rule.megatron.startswith("mtp.")


def _rules(c: DecoderConfig) -> Iterator[Rule]:
    vocabulary = (c.vocab_size, c.hidden_size)
    predictions = [f"model.layers.{c.num_hidden_layers + depth}" for depth in range(c.prediction_layers)]

    def in_predictions(name: str) -> tuple[HfTensor, ...]:
        return tuple(HfTensor(f"{prefix}.{name}", vocabulary) for prefix in predictions)

    embedding, head = (
        HfTensor("model.embed_tokens.weight", vocabulary),
        HfTensor("lm_head.weight", vocabulary),
    )
    yield Rule(
        "embedding.word_embeddings.weight", (embedding,), shard=Along(0),
        copies=(head,) if c.tie_word_embeddings else in_predictions("embed_tokens.weight"),
        writes_copies=not c.tie_word_embeddings,
    )  # fmt: skip
    for layer in range(c.num_hidden_layers):
        yield from _layer_rules(c, layer, f"decoder.layers.{layer}", f"model.layers.{layer}")
    yield Rule("decoder.final_layernorm.weight", (HfTensor("model.norm.weight", (c.hidden_size,)),))
    if not c.tie_word_embeddings:
        yield Rule(
            "output_layer.weight", (head,), shard=Along(0), copies=in_predictions("shared_head.head.weight"),
            writes_copies=True,
        )  # fmt: skip
    for depth, theirs in enumerate(predictions):
        yield from _prediction_rules(c, depth, theirs)


def _prediction_rules(c: DecoderConfig, depth: int, theirs: str) -> Iterator[Rule]:
    """A layer of multi-token prediction: two norms, their joint projection, a decoder layer, a norm."""
    ours, layer = f"mtp.layers.{depth}", c.num_hidden_layers + depth
    for norm, name in (("enorm", "enorm"), ("hnorm", "hnorm"), ("final_layernorm", "shared_head.norm")):
        yield Rule(f"{ours}.{norm}.weight", (HfTensor(f"{theirs}.{name}.weight", (c.hidden_size,)),))
    projection = HfTensor(f"{theirs}.eh_proj.weight", (c.hidden_size, 2 * c.hidden_size))
    yield Rule(f"{ours}.eh_proj.weight", (projection,), shard=Along(0))
    yield from _layer_rules(c, layer, f"{ours}.transformer_layer", theirs)


def _layer_rules(c: DecoderConfig, layer: int, ours: str, theirs: str) -> Iterator[Rule]:
    yield from _attention_rules(c, ours, theirs)
    if c.is_moe_layer(layer):
        assert c.moe is not None
        yield from _moe_rules(c.hidden_size, c.moe, f"{ours}.mlp", f"{theirs}.mlp")
    else:
        yield from _swiglu_rules(f"{ours}.mlp", f"{theirs}.mlp", c.hidden_size, c.intermediate_size)


def _attention_rules(c: DecoderConfig, ours: str, theirs: str) -> Iterator[Rule]:
    rows = {
        "q": c.num_attention_heads * c.head_dim,
        "k": c.num_key_value_heads * c.head_dim,
        "v": c.num_key_value_heads * c.head_dim,
    }
    qkv = GroupedQKV(c.num_key_value_heads, c.num_attention_heads // c.num_key_value_heads, c.head_dim)

    def projections(kind: str, *columns: int) -> tuple[HfTensor, ...]:
        return tuple(
            HfTensor(f"{theirs}.self_attn.{part}_proj.{kind}", (size, *columns))
            for part, size in rows.items()
        )

    for megatron, hf in (
        ("input_layernorm", "input_layernorm"),
        ("pre_mlp_layernorm", "post_attention_layernorm"),
    ):
        yield Rule(f"{ours}.{megatron}.weight", (HfTensor(f"{theirs}.{hf}.weight", (c.hidden_size,)),))
    linear_qkv = f"{ours}.self_attention.linear_qkv"
    yield Rule(f"{linear_qkv}.weight", projections("weight", c.hidden_size), qkv, Along(0))
    if c.attention_bias:
        yield Rule(f"{linear_qkv}.bias", projections("bias"), qkv, Along(0))
    for norm in ("q", "k") if c.qk_norm else ():
        weight = HfTensor(f"{theirs}.self_attn.{norm}_norm.weight", (c.head_dim,))
        yield Rule(f"{ours}.self_attention.{norm}_layernorm.weight", (weight,))
    output = HfTensor(f"{theirs}.self_attn.o_proj.weight", (c.hidden_size, rows["q"]))
    yield Rule(f"{ours}.self_attention.linear_proj.weight", (output,), shard=Along(1))


def _moe_rules(hidden: int, moe: MoeConfig, ours: str, theirs: str) -> Iterator[Rule]:
    yield Rule(f"{ours}.router.weight", (HfTensor(f"{theirs}.gate.weight", (moe.experts, hidden)),))
    if moe.expert_bias:
        bias = HfTensor(f"{theirs}.gate.e_score_correction_bias", (moe.experts,))
        yield Rule(f"{ours}.router.expert_bias", (bias,))
    if moe.shared_width:
        shared = f"{ours}.shared_experts", f"{theirs}.shared_experts"
        yield from _swiglu_rules(*shared, hidden, moe.shared_width)
    for expert in range(moe.experts):
        local, remote = f"{ours}.experts.local_experts.{expert}", f"{theirs}.experts.{expert}"
        for rule in _swiglu_rules(local, remote, hidden, moe.width):
            yield Rule(rule.megatron, rule.hf, rule.join)


def _swiglu_rules(ours: str, theirs: str, hidden: int, width: int) -> Iterator[Rule]:
    gate_up = tuple(HfTensor(f"{theirs}.{part}_proj.weight", (width, hidden)) for part in ("gate", "up"))
    down = HfTensor(f"{theirs}.down_proj.weight", (hidden, width))
    yield Rule(f"{ours}.linear_fc1.weight", gate_up, GateUp(), GatedRows())
    yield Rule(f"{ours}.linear_fc2.weight", (down,), shard=Along(1))
