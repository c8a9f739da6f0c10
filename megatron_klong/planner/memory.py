"""Memory of each rank of a layout, by kind."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_klong.config import ModelConfig, ParallelConfig, Recompute
from megatron_klong.model.decoder import DecoderConfig
from megatron_klong.model.parameters import StageParameters, stage_parameters
from megatron_klong.planner.activations import WEIGHT_BYTES, Activations, Kernels, rank_tokens

GRADIENT_BYTES = 4
OPTIMIZER_BYTES = {"fp32": 8, "bf16": 12}
"""Of a trained parameter: two moments, and of bf16 weights an fp32 copy."""

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
        optimizer: this rank's share of moments and fp32 weights.
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

    def stages(self) -> tuple[RankMemory, ...]:
        """Of a rank of every pipeline stage."""
        held = stage_parameters(self.hf, self.parallel)
        return tuple(self._stage(number, stage) for number, stage in enumerate(held))

    def _stage(self, number: int, held: StageParameters) -> RankMemory:
        is_last = number == self.parallel.pipeline - 1
        trains_prediction = is_last and self.model.prediction == "train"
        trained = held.decoder + held.prediction if trains_prediction else held.decoder
        size = WEIGHT_BYTES[self.model.precision]
        copies, expert_copies = self._copies()
        shares = trained.dense / copies + trained.experts / expert_copies
        both = held.decoder + held.prediction
        activations, temporary, logits = self._dynamic(number, held)
        tensors = (
            size * both.total + _WIDE * both.bias, GRADIENT_BYTES * trained.total,
            round(OPTIMIZER_BYTES[self.model.precision] * shares), activations, temporary, logits,
        )  # fmt: skip
        return RankMemory(
            *tensors,
            communication=self._in_transit() + self._communication(),
            runtime=self.overheads.context + round(self.overheads.fragmentation * sum(tensors)),
        )

    def _copies(self) -> tuple[int, int]:
        """Ranks with the same dense parameters, and with the same experts: they share the optimizer."""
        stage = self.ranks // self.parallel.pipeline
        return stage // self.parallel.tensor, stage // self.parallel.expert

    def _dynamic(self, number: int, held: StageParameters) -> tuple[int, int, int]:
        """Activations, temporary memory, and what logits need beyond that."""
        pipeline = self.parallel.pipeline
        is_first, is_last = number == 0, number == pipeline - 1
        tokens = rank_tokens(self.hf, self.parallel, self.row_tokens, self.imbalance)
        of = Activations(self.hf, self.parallel, self.model, tokens, self.kernels)
        kept = of.row() + sum(of.layer(layer, self._recompute(layer, held)) for layer in held.layers)
        kept += of.first_stage() if is_first else of.states  # received
        kept += of.last_stage() if is_last else of.states  # sent, and not yet given up
        predicts = is_last and self.model.prediction == "train"
        kept += self.hf.prediction_layers * of.prediction() if predicts else 0
        # One forward, one backward: so many forward passes are ahead of the first backward pass.
        under_way = min(pipeline - number, self.micro_batches)
        row = tokens.own * (_ROW_BYTES + 2 * _WIDE * self.hf.rotary_dim)
        temporary = row + self._temporary(of, held, is_first=is_first, is_last=is_last)
        logits = row + self._logits(of) if is_last else 0
        return kept * under_way, temporary, max(0, logits - temporary - self._in_transit())

    def _recompute(self, layer: int, held: StageParameters) -> Recompute:
        first = self.model.recompute_layers
        return self.model.recompute if first is None or layer - held.layers.start < first else "none"

    def _temporary(self, of: Activations, held: StageParameters, *, is_first: bool, is_last: bool) -> int:
        """Beyond what is kept, in the backward pass from the last layer to the first, which frees it."""
        # Of the final norm; torch's is made of four steps in fp32.
        norm = 4 * _WIDE if self.kernels == "torch" else 2 * of.size
        norm *= of.tokens.shared * self.hf.hidden_size
        most, freed = (norm, of.last_stage()) if is_last else (0, 0)
        for layer in reversed(held.layers):
            recompute = self._recompute(layer, held)
            again = self._computed_again(of, layer, recompute)
            most = max(most, again + self._gradients(of, layer) - freed)
            freed += of.layer(layer, recompute)
        embedding = of.size * self.hf.vocab_size // self.parallel.tensor * self.hf.hidden_size
        return max(most, embedding - freed) if is_first else most

    def _computed_again(self, of: Activations, layer: int, recompute: Recompute) -> int:
        """A whole layer, or one module after the other."""
        each = [(module,) for module in recompute] if isinstance(recompute, tuple) else [recompute]
        return of.layer(layer, "none") - min(of.layer(layer, part) for part in each)

    def _gradients(self, of: Activations, layer: int) -> int:
        """The largest that exist at a time in the backward pass of a layer."""
        hf, parallel, tokens, size = self.hf, self.parallel, of.tokens, of.size
        if not hf.is_moe_layer(layer):
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
        if parallel.pipeline > 1:  # hidden states one way, their gradients the other
            numbers += 2 * tokens.shared * hf.hidden_size
        return WEIGHT_BYTES[self.model.precision] * numbers

    def _communication(self) -> int:
        parallel, (copies, expert_copies) = self.parallel, self._copies()
        sizes = (parallel.tensor, parallel.context, parallel.pipeline, parallel.expert, copies, expert_copies)
        groups = sum(size > 1 for size in sizes)
        peers = min(parallel.expert - 1, self.overheads.peers)
        return self.overheads.communicator * groups + self.overheads.peer * peers
