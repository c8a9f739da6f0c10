"""Parameters of a model, and those of a rank, counted from the shape. Imports no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import accumulate, pairwise

from megatron_klong.config import ParallelConfig
from megatron_klong.model.decoder import DecoderConfig, MoeConfig
from megatron_klong.model.stages import stage_layers


@dataclass(frozen=True)
class Parameters:
    """Parameters, by who has copies of them.

    Attributes:
        dense: copied on the data- and context-parallel ranks.
        experts: of routed experts, copied on fewer: data-parallel ranks with other experts have none.
        bias: elements of the routers' biases, fp32 buffers that nobody trains by gradients (twice: a count of
            tokens stands beside each).
    """

    dense: int = 0
    experts: int = 0
    bias: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(self.dense + other.dense, self.experts + other.experts, self.bias + other.bias)

    def __mul__(self, times: int) -> Parameters:
        return Parameters(self.dense * times, self.experts * times, self.bias * times)

    @property
    def total(self) -> int:
        """All but the biases."""
        return self.dense + self.experts


@dataclass(frozen=True)
class RankParameters:
    """What each rank of a place in the pipeline holds.

    Attributes:
        stages: numbers of the decoder layers of each of its stages.
        decoder: parameters of these, of embedding, final norm and head.
        prediction: of multi-token prediction layers, on the last rank.
    """

    stages: tuple[range, ...]
    decoder: Parameters
    prediction: Parameters


@dataclass(frozen=True)
class ParameterCounts:
    """Trained parameters; the router's bias is a buffer and does not count.

    Attributes:
        total: of the decoder, with embeddings and head.
        active: of them, those that one token passes through.
        prediction: of multi-token prediction layers, beside the total.
    """

    total: int
    active: int
    prediction: int


def parameter_counts(hf: DecoderConfig) -> ParameterCounts:
    """Of the whole model."""
    (whole,) = rank_parameters(hf, ParallelConfig())
    moe, idle = hf.moe, 0
    if moe is not None:
        idle = whole.decoder.experts // moe.experts * (moe.experts - moe.top_k)
    return ParameterCounts(whole.decoder.total, whole.decoder.total - idle, whole.prediction.total)


def rank_parameters(hf: DecoderConfig, parallel: ParallelConfig) -> tuple[RankParameters, ...]:
    """Of every pipeline rank, in order. The layout must fit the model (``model.layout.check_layout``)."""
    ends = [0, *accumulate(stage_layers(hf.num_hidden_layers, parallel.stages))]
    stages = [range(start, end) for start, end in pairwise(ends)]
    is_moe = [hf.is_moe_layer(n) for n in range(ends[-1])]
    kinds = {kind: _layer(hf, kind, parallel) for kind in set(is_moe)}
    ranks = []
    for rank in range(parallel.pipeline):
        own = tuple(stages[rank :: parallel.pipeline])
        is_first, is_last = rank == 0, rank == parallel.pipeline - 1
        count = Counter(is_moe[n] for layers in own for n in layers)
        held = sum((kinds[kind] * layers for kind, layers in count.items()), Parameters())
        vocabulary = hf.vocab_size // parallel.tensor * hf.hidden_size
        if is_first:
            held += Parameters(dense=vocabulary)
        if is_last:
            copy_of_embedding = hf.tie_word_embeddings and is_first
            held += Parameters(dense=hf.hidden_size + (0 if copy_of_embedding else vocabulary))
            if hf.prediction_layers and not is_first:
                held += Parameters(dense=vocabulary)  # the prediction layers look up embeddings too
        prediction = _prediction(hf, parallel) if is_last else Parameters()
        ranks.append(RankParameters(own, held, prediction))
    return tuple(ranks)


def _layer(hf: DecoderConfig, is_moe: bool, parallel: ParallelConfig) -> Parameters:
    hidden, tensor = hf.hidden_size, parallel.tensor
    queries, keys = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
    dense = 2 * hidden + (queries + 2 * keys + queries) // tensor * hidden
    if hf.attention_bias:
        dense += (queries + 2 * keys) // tensor
    if hf.qk_norm:
        dense += 2 * hf.head_dim
    if not is_moe:
        return Parameters(dense=dense + 3 * hf.intermediate_size // tensor * hidden)
    moe = hf.moe
    assert moe is not None
    return Parameters(dense=dense) + _experts(moe, hidden, parallel)


def _experts(moe: MoeConfig, hidden: int, parallel: ParallelConfig) -> Parameters:
    """The router, the shared experts and this rank's routed ones."""
    return Parameters(
        dense=moe.experts * hidden + 3 * moe.shared_width // parallel.tensor * hidden,
        experts=moe.experts // parallel.expert * 3 * hidden * moe.width,
        bias=2 * moe.experts if moe.expert_bias else 0,
    )


def _prediction(hf: DecoderConfig, parallel: ParallelConfig) -> Parameters:
    """Each: two norms before, a projection of both, a layer like the last one, a norm behind."""
    hidden = hf.hidden_size
    one = _layer(hf, hf.is_moe_layer(hf.num_hidden_layers), parallel)
    one += Parameters(dense=3 * hidden + 2 * hidden * hidden // parallel.tensor)
    return sum((one for _ in range(hf.prediction_layers)), Parameters())
