"""Memory of each rank of a layout, by kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_klong.config import ModelConfig, ParallelConfig, Recompute
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.parameters import RankParameters, rank_parameters
from megatron_klong.planner.activations import WEIGHT_BYTES, Activations, Kernels, rank_tokens
from megatron_klong.planner.schedule import backward_moments

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
"""Of a trained parameter."""

COPY_BYTES = {"fp32": 0, "bf16": 4}
"""Of a trained parameter: the fp32 copy that is updated."""

OFFLOADED_PIECE_BYTES = 1 << 28
"""Of offloaded moments, that a device updates at a time; the trainer keeps to it."""

_WEIGHED_BYTES = {"fp32": 7, "bf16": 11}
"""Of each number between the two products of an expert, when most of its gradients exist: the product with
the router's weights is in fp32, and its gradient. As measured; what backward has freed is taken off."""

_WIDE = 4
_ROW_BYTES = 8 + 8 + 4 + 8 + 1
"""Of a token of the present row: id, label, loss mask, position, padding."""


@dataclass(frozen=True)
class Overheads:
    """What comes on top of the tensors, in bytes. The defaults are of NCCL and CUDA, from published figures
    (docs/planner.md), and have not been measured by this project.

    Attributes:
        context: of the process on the device.
        communicator: of each process group with more than one rank.
        peer: of each rank that tokens are sent to and received from, up to ``peers``.
        peers: with which there is a direct connection.
        fragmentation: share of the tensors that the allocator holds on top.
    """

    context: int = 1_100_000_000
    communicator: int = 400_000_000
    peer: int = 470_000_000
    peers: int = 7
    fragmentation: float = 0.07


OVERHEADS = Overheads()
NO_OVERHEADS = Overheads(context=0, communicator=0, peer=0, fragmentation=0.0)
"""For what a process allocates by torch."""


@dataclass(frozen=True)
class RankMemory:
    """Most bytes that a rank holds at a time, by kind; they add up to ``total``.

    Attributes:
        weights: in the model's precision, those of prediction layers included.
        gradients: sums in fp32.
        optimizer: this rank's share of moments and fp32 weights, as far as it is on the device.
        activations: kept for the backward passes of all micro-batches that are under way.
        temporary: of the backward pass of a layer, and of a layer that is computed again.
        logits: of a chunk of tokens, and the head's gradient, as far as they exceed what is temporary or on
            its way between ranks, which is not there at the same time.
        communication: buffers of the process groups, and what is on its way between ranks.
        runtime: of the process on its device, and what its allocator cannot use.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int
    logits: int
    communication: int
    runtime: int

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _LayerMemory:
    """Bytes of a decoder layer: kept until its backward pass, and needed in it beside what is kept."""

    kept: int
    backward: int


@dataclass(frozen=True)
class _StageMemory:
    """Bytes of a pipeline stage: of a forward pass that is kept, in its backward pass, and what logits need
    beyond that."""

    kept: int
    temporary: int
    logits: int


@dataclass(frozen=True)
class MemoryModel:
    """A model at a layout.

    Args:
        hf: the model's shape.
        parallel: the layout, which must fit the shape.
        model: precision, recomputation, prediction layers.
        ranks: of the layout.
        row_tokens: of a micro-batch.
        micro_batches: of a step, on each data-parallel rank.
        kernels: whose layers.
        imbalance: tokens that the busiest rank's experts receive, over the average.
        overheads: beside the tensors.
        offload: whether moments are in host memory.
    """

    hf: DecoderConfig
    parallel: ParallelConfig
    model: ModelConfig
    ranks: int
    row_tokens: int
    micro_batches: int
    kernels: Kernels
    imbalance: float
    overheads: Overheads = OVERHEADS
    offload: bool = False

    def pipeline(self) -> tuple[RankMemory, ...]:
        """Of a rank of every place in the pipeline."""
        places = rank_parameters(self.hf, self.parallel)
        stages = self._stages([layers for held in places for layers in held.stages])
        return tuple(
            self._rank(place, held, [stages[layers] for layers in held.stages])
            for place, held in enumerate(places)
        )

    def _rank(self, place: int, held: RankParameters, stages: Sequence[_StageMemory]) -> RankMemory:
        trained, owned = self._trained(held)
        size = WEIGHT_BYTES[self.model.precision]
        both = held.decoder + held.prediction
        kept, now = self._fullest_moment(place, stages)
        temporary, moments = now.temporary, MOMENT_BYTES * owned
        if self.offload:  # there is nothing else while a piece is updated
            piece = self._piece(place, moments)
            temporary = max(temporary, piece - kept - now.logits)
            moments = 0
        tensors = (
            size * both.total + _WIDE * both.bias, GRADIENT_BYTES * trained,
            COPY_BYTES[self.model.precision] * owned + moments, kept, temporary, now.logits,
        )  # fmt: skip
        return RankMemory(
            *tensors,
            communication=self._in_transit() + self._communication(),
            runtime=self.overheads.context + round(self.overheads.fragmentation * sum(tensors)),
        )

    def host(self) -> tuple[int, ...]:
        """Bytes of host memory for what is offloaded by a rank of every place in the pipeline."""
        if not self.offload:
            return (0,) * self.parallel.pipeline
        return tuple(
            MOMENT_BYTES * self._trained(held)[1] for held in rank_parameters(self.hf, self.parallel)
        )

    def _trained(self, held: RankParameters) -> tuple[int, int]:
        """Parameters that a rank has gradients of, and those of which it keeps what the optimizer needs."""
        trained = held.decoder
        if self.model.prediction == "train":
            trained += held.prediction
        copies, expert_copies = self._copies()
        return trained.total, round(trained.dense / copies + trained.experts / expert_copies)

    def _piece(self, place: int, moments: int) -> int:
        """Of offloaded moments on the device: a piece, or those of the largest weight, if a rank owns all of
        it: embedding, head, or experts, which Transformer Engine holds one by one."""
        hf, largest = self.hf, 0
        if place in (0, self.parallel.pipeline - 1):
            largest = hf.vocab_size // self.parallel.tensor * hf.hidden_size
        if hf.moe is not None:
            together = hf.moe.experts // self.parallel.expert if self.kernels == "torch" else 1
            largest = max(largest, together * 2 * hf.moe.width * hf.hidden_size)
        return min(moments, max(OFFLOADED_PIECE_BYTES, MOMENT_BYTES * largest))

    def _copies(self) -> tuple[int, int]:
        """Ranks with the same dense parameters, and with the same experts: they share the optimizer."""
        place = self.ranks // self.parallel.pipeline
        return place // self.parallel.tensor, place // self.parallel.expert

    def _fullest_moment(self, place: int, stages: Sequence[_StageMemory]) -> tuple[int, _StageMemory]:
        """Activations when they and what a backward pass needs are most, and the stage of that pass."""
        parallel = self.parallel
        moments = (
            (sum(count * stage.kept for count, stage in zip(kept, stages)), stages[now])
            for now, kept in backward_moments(parallel.pipeline, parallel.virtual, self.micro_batches, place)
        )
        return max(moments, key=lambda moment: moment[0] + moment[1].temporary + moment[1].logits)

    def _stages(self, stages: Sequence[range]) -> dict[range, _StageMemory]:
        """Of each stage, by its layers; alike ones are calculated once."""
        tokens = rank_tokens(self.hf, self.parallel, self.row_tokens, self.imbalance)
        of = Activations(self.hf, self.parallel, self.model, tokens, self.kernels)
        is_moe = [self.hf.is_moe_layer(layer) for layer in range(self.hf.num_hidden_layers)]
        recomputes: dict[bool, Recompute] = {True: self.model.recompute, False: "none"}
        kinds = {
            (moe, again): self._layer(of, moe, recomputes[again])
            for moe in set(is_moe)
            for again in recomputes
        }
        first = self.model.recompute_layers
        alike: dict[tuple[tuple[_LayerMemory, ...], bool, bool], _StageMemory] = {}
        found = {}
        for layers in stages:
            own = tuple(
                kinds[is_moe[layer], first is None or place < first] for place, layer in enumerate(layers)
            )
            is_first, is_last = layers.start == 0, layers.stop == self.hf.num_hidden_layers
            key = own, is_first, is_last
            if key not in alike:
                alike[key] = self._stage(of, own, is_first=is_first, is_last=is_last)
            found[layers] = alike[key]
        return found

    def _stage(
        self, of: Activations, layers: Sequence[_LayerMemory], *, is_first: bool, is_last: bool
    ) -> _StageMemory:
        kept = of.row() + sum(layer.kept for layer in layers)
        kept += of.first_stage() if is_first else of.states  # received
        kept += of.last_stage() if is_last else of.states  # sent, and not yet given up
        predicts = is_last and self.model.prediction == "train"
        kept += self.hf.prediction_layers * of.prediction() if predicts else 0
        row = of.tokens.own * (_ROW_BYTES + 2 * _WIDE * self.hf.rotary_dim)
        temporary = row + self._temporary(of, layers, is_first=is_first, is_last=is_last)
        logits = row + self._logits(of) if is_last else 0
        return _StageMemory(kept, temporary, max(0, logits - temporary - self._in_transit()))

    def _temporary(
        self, of: Activations, layers: Sequence[_LayerMemory], *, is_first: bool, is_last: bool
    ) -> int:
        """Beyond what is kept, in the backward pass from the last layer to the first, which frees it."""
        # Of the final norm; torch's is made of four steps in fp32.
        norm = 4 * _WIDE if self.kernels == "torch" else 2 * of.size
        norm *= of.tokens.shared * self.hf.hidden_size
        most, freed = (norm, of.last_stage()) if is_last else (0, 0)
        for layer in reversed(layers):
            most = max(most, layer.backward - freed)
            freed += layer.kept
        embedding = of.size * self.hf.vocab_size // self.parallel.tensor * self.hf.hidden_size
        return max(most, embedding - freed) if is_first else most

    def _layer(self, of: Activations, is_moe: bool, recompute: Recompute) -> _LayerMemory:
        # A whole layer is computed again, or one module after the other.
        each = [(module,) for module in recompute] if isinstance(recompute, tuple) else [recompute]
        again = of.layer(is_moe, "none") - min(of.layer(is_moe, part) for part in each)
        return _LayerMemory(of.layer(is_moe, recompute), again + self._gradients(of, is_moe))

    def _gradients(self, of: Activations, is_moe: bool) -> int:
        """The largest that exist at a time in the backward pass of a layer."""
        hf, parallel, tokens, size = self.hf, self.parallel, of.tokens, of.size
        if not is_moe:
            return 2 * size * tokens.own * hf.intermediate_size // parallel.tensor
        moe = hf.moe
        assert moe is not None
        weighed = _WEIGHED_BYTES[self.model.precision] * tokens.routed * moe.width
        first_weights = moe.experts // parallel.expert * 2 * moe.width * hf.hidden_size
        multiplied = size * (first_weights + tokens.routed * moe.width)  # what is freed by then taken off
        return max(weighed, multiplied)

    def _logits(self, of: Activations) -> int:
        """Of a chunk, in fp32 and in the model's precision; the gradients of head and hidden states."""
        words, hidden, tokens = self.hf.vocab_size // self.parallel.tensor, self.hf.hidden_size, of.tokens.own
        chunk = min(self.model.loss_chunk_tokens, tokens)
        low = of.size if of.size < _WIDE else 0
        # On a GPU a product of bf16 is made in fp32 before it is added.
        products = 2 if low and self.kernels == "transformer-engine" else 1
        head = _WIDE * words * hidden * products
        return chunk * words * (_WIDE + low) + chunk * hidden * _WIDE + head + of.size * tokens * hidden

    def _in_transit(self) -> int:
        """What an operation sends and receives, which live as long as it does."""
        hf, parallel = self.hf, self.parallel
        tokens = rank_tokens(hf, parallel, self.row_tokens, self.imbalance)
        numbers = 0
        if parallel.expert > 1:
            sent = rank_tokens(hf, parallel, self.row_tokens, 1.0).routed
            numbers += (sent + tokens.routed) * hf.hidden_size
        if parallel.context > 1:  # keys and values of the row, not yet in its order
            numbers += tokens.row * 2 * hf.num_key_value_heads // parallel.tensor * hf.head_dim
        if parallel.tensor > 1:  # hidden states of all its ranks
            numbers += tokens.own * hf.hidden_size
        if parallel.pipeline > 1:
            # Hidden states one way, their gradients the other; with interleaved stages the next ones arrive.
            numbers += (3 if parallel.virtual > 1 else 2) * tokens.shared * hf.hidden_size
        return WEIGHT_BYTES[self.model.precision] * numbers

    def _communication(self) -> int:
        parallel, (copies, expert_copies) = self.parallel, self._copies()
        sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.expert, copies, expert_copies)
        groups = sum(size > 1 for size in sizes)
        groups += 2 if parallel.virtual > 1 else 0  # to each neighbour
        peers = min(parallel.expert - 1, self.overheads.peers)
        return self.overheads.communicator * groups + self.overheads.peer * peers
