"""How long a step takes, by a stated cost model. Its figures rank layouts; they promise no speed.

A micro-batch on a rank costs its floating-point operations at a share of the device's peak, the traffic of
its activations to and from memory, and what it sends to other ranks, one after the other: nothing is assumed
to overlap. docs/planner.md compares it with published runs; no figure has been measured by this project.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_klong.config import ModelConfig, ParallelConfig
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.parameters import rank_parameters
from megatron_klong.planner.activations import WEIGHT_BYTES, Activations, Kernels, rank_tokens
from megatron_klong.planner.memory import GRADIENT_BYTES

_BACKWARD = 2


@dataclass(frozen=True)
class Hardware:
    """A node's devices and what joins them. Rates are of one device and one direction, in bytes/s.

    Attributes:
        flops: dense bf16 operations/s at most.
        memory_rate: of the device's memory.
        node_rate: to devices of its node.
        network_rate: to other nodes.
        host_rate: from and to host memory, when all devices of a node do so.
        node: devices of a node.
        dense, grouped, attention: share of ``flops`` of products in layers, in experts, in attention.
        sent: share of a link's rate that collective operations reach.
        passes: times that an activation goes to or from memory in a forward pass.
    """

    flops: float = 989e12
    memory_rate: float = 3.35e12
    node_rate: float = 450e9
    network_rate: float = 50e9
    host_rate: float = 25e9
    node: int = 8
    dense: float = 0.6
    grouped: float = 0.4
    attention: float = 0.4
    sent: float = 0.7
    passes: float = 3.0


H100 = Hardware()
"""SXM, with NVLink and 400 Gb/s of network for each device."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step.

    Attributes:
        pipeline: all micro-batches through all stages, the filling and draining of the pipeline included.
        idle: of that, a stage's waiting for others.
        synchronising: of gradients and weights of data-parallel ranks, and the optimizer, offloaded or not.
    """

    pipeline: float
    idle: float
    synchronising: float

    @property
    def total(self) -> float:
        """Of the step."""
        return self.pipeline + self.synchronising


def step_time(
    hf: DecoderConfig, parallel: ParallelConfig, model: ModelConfig, ranks: int, row_tokens: int,
    micro_batches: int, kernels: Kernels, imbalance: float, hardware: Hardware = H100, offloaded: int = 0,
) -> StepTime:  # fmt: skip
    """Of a step of ``micro_batches`` rows on each data-parallel rank, each row one document; ``offloaded``
    bytes go from host memory to the device and back."""
    tokens = rank_tokens(hf, parallel, row_tokens, imbalance)
    of = Activations(hf, parallel, model, tokens, kernels)
    places = rank_parameters(hf, parallel)
    kinds = {is_moe: _layer_seconds(of, is_moe, hardware) for is_moe in (False, True) if hf.moe or not is_moe}
    slowest = 0.0
    for place, held in enumerate(places):
        seconds = sum(kinds[hf.is_moe_layer(layer)] for layers in held.stages for layer in layers)
        if place == len(places) - 1:
            seconds += _last_seconds(of, hardware)
        slowest = max(slowest, seconds)
    if parallel.pipeline > 1:  # hidden states to each stage and on, and their gradients
        rate = hardware.node_rate if ranks <= hardware.node else hardware.network_rate
        slowest += 2 * parallel.virtual * of.states / (rate * hardware.sent)
    # Megatron-LM's second paper, section 2.2.2: each of a rank's stages fills the pipeline for itself.
    idle = (parallel.pipeline - 1) * slowest / parallel.virtual
    stage_ranks = ranks // parallel.pipeline
    copies, expert_copies = stage_ranks // parallel.tensor, stage_ranks // parallel.expert
    busiest = max(places, key=lambda held: held.decoder.total).decoder
    each = GRADIENT_BYTES + WEIGHT_BYTES[model.precision]
    synchronising = 2 * offloaded / hardware.host_rate
    for parameters, group in ((busiest.dense, copies), (busiest.experts, expert_copies)):
        rate = hardware.node_rate if stage_ranks <= hardware.node else hardware.network_rate
        synchronising += each * parameters * (1 - 1 / group) / (rate * hardware.sent)
        synchronising += 30 * parameters / group / hardware.memory_rate  # all of its state
    return StepTime((micro_batches * slowest) + idle, idle, synchronising)


def _last_seconds(of: Activations, hardware: Hardware) -> float:
    """The head, whose logits are made once more in the backward pass, and prediction layers with heads of
    theirs."""
    hf, dense = of.hf, hardware.flops * hardware.dense
    predicted = hf.prediction_layers if of.model.prediction == "train" else 0
    head = 2 * of.tokens.own * hf.hidden_size * hf.vocab_size / of.parallel.tensor
    joined = 2 * of.tokens.own * 2 * hf.hidden_size**2 / of.parallel.tensor
    own_layer = _layer_seconds(of, hf.is_moe_layer(hf.num_hidden_layers), hardware)
    each = own_layer + (1 + _BACKWARD) * joined / dense
    return (1 + predicted) * (2 + _BACKWARD) * head / dense + predicted * each


def _layer_seconds(of: Activations, is_moe: bool, hardware: Hardware) -> float:
    """Forward, backward, and what is computed again."""
    attention, inner = _attention_seconds(of, hardware), _inner_seconds(of, is_moe, hardware)
    traffic = hardware.passes * of.layer(is_moe, "none") / hardware.memory_rate
    once = attention + inner + traffic
    recompute = of.model.recompute
    if recompute == "full":
        again = once
    elif recompute == "none":
        again = 0.0
    else:
        again = inner if {"moe", "mlp"} & set(recompute) else 0.0
        again += _core_seconds(of, hardware) if "core_attn" in recompute else 0.0
    return (1 + _BACKWARD) * once + again


def _core_seconds(of: Activations, hardware: Hardware) -> float:
    """Scores and their products with values, causal over the whole row."""
    hf, row = of.hf, of.tokens.row
    pairs = row * (row + 1) / 2
    operations = 4 * pairs * hf.num_attention_heads * hf.head_dim / (of.parallel.tensor * of.parallel.context)
    return operations / (hardware.flops * hardware.attention)


def _attention_seconds(of: Activations, hardware: Hardware) -> float:
    """Projections and core; what tensor- and context-parallel ranks send one another."""
    hf, parallel, tokens = of.hf, of.parallel, of.tokens
    queries, keys = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    weights = hf.hidden_size * (2 * queries + 2 * keys) / parallel.tensor
    seconds = 2 * tokens.own * weights / (hardware.flops * hardware.dense) + _core_seconds(of, hardware)
    seconds += _gathered_seconds(of, hardware)
    if parallel.context > 1:
        sent = of.size * tokens.row * 2 * keys / parallel.tensor
        seconds += sent / (_rate(parallel.tensor * parallel.context, hardware) * hardware.sent)
    return seconds


def _inner_seconds(of: Activations, is_moe: bool, hardware: Hardware) -> float:
    """The feed-forward part: dense, or router, shared and routed experts and the way to them and back."""
    hf, parallel, tokens = of.hf, of.parallel, of.tokens
    dense = hardware.flops * hardware.dense
    if not is_moe:
        work = 6 * tokens.own * hf.hidden_size * hf.intermediate_size / parallel.tensor
        return work / dense + _gathered_seconds(of, hardware)
    moe = hf.moe
    assert moe is not None
    shared = 6 * tokens.own * hf.hidden_size * moe.shared_width / parallel.tensor
    routed = 6 * tokens.routed * hf.hidden_size * moe.width
    there_and_back = 2 * of.size * tokens.routed * hf.hidden_size
    return (
        shared / dense + routed / (hardware.flops * hardware.grouped)
        + there_and_back * _spread(parallel.expert, hardware)
        + (_gathered_seconds(of, hardware) if moe.shared_width else 0.0)
    )  # fmt: skip


def _gathered_seconds(of: Activations, hardware: Hardware) -> float:
    """Hidden states gathered before a part of a layer, and summed and scattered behind it."""
    ways = of.parallel.tensor
    sent = 2 * of.size * of.tokens.own * of.hf.hidden_size * (1 - 1 / ways)
    return sent / (_rate(ways, hardware) * hardware.sent)


def _spread(ranks: int, hardware: Hardware) -> float:
    """Seconds for each byte that a rank sends evenly to neighbouring ranks, itself among them."""
    near = min(ranks, hardware.node)
    to_node, to_network = (near - 1) / ranks, (ranks - near) / ranks
    return (to_node / hardware.node_rate + to_network / hardware.network_rate) / hardware.sent


def _rate(ranks: int, hardware: Hardware) -> float:
    """Of a group of neighbouring ranks: the network's as soon as it leaves the node."""
    return hardware.node_rate if ranks <= hardware.node else hardware.network_rate
