"""What a rank keeps of a forward pass until the backward pass, tensor by tensor.

The terms follow this package's layers: Megatron-Core's with our attention, norms and experts. H is the
hidden size, K the experts of a token; of a rank, T are its tokens of a row, S those with sequence parallelism
(T / TP), N those that its experts receive, R the tokens of the whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_klong.config import ModelConfig, ParallelConfig, Recompute
from megatron_klong.model.decoder import DecoderConfig, MoeConfig

Kernels = Literal["torch", "transformer-engine"]
"""Whose layers: torch's alone, or with Transformer Engine's norms and linear layers. Those are measured by
this package's tests; the latter follow from its sources and have not been measured on a GPU."""

WEIGHT_BYTES = {"fp32": 4, "bf16": 2}
_WIDE = 4
_INDEX = 8


@dataclass(frozen=True)
class RankTokens:
    """Tokens of a micro-batch, which is a row, as a rank sees them.

    Attributes:
        row: R, of the whole row: with context parallelism, keys and values of all of them are gathered.
        own: T.
        shared: S.
        routed: N; on average S x K.
    """

    row: int
    own: int
    shared: int
    routed: int


def rank_tokens(hf: DecoderConfig, parallel: ParallelConfig, row_tokens: int, imbalance: float) -> RankTokens:
    """Of a rank whose experts receive ``imbalance`` times the average."""
    own = row_tokens // parallel.context
    shared = own // parallel.tensor
    top_k = hf.moe.top_k if hf.moe else 0
    return RankTokens(row_tokens, own, shared, round(shared * top_k * imbalance))


@dataclass(frozen=True)
class Activations:
    """Bytes that layers keep.

    Args:
        hf: the model's shape.
        parallel: the layout.
        model: precision, and what is computed again.
        tokens: of a micro-batch.
        kernels: whose layers.
    """

    hf: DecoderConfig
    parallel: ParallelConfig
    model: ModelConfig
    tokens: RankTokens
    kernels: Kernels

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return WEIGHT_BYTES[self.model.precision]

    @property
    def states(self) -> int:
        """Bytes of hidden states between layers: S x H."""
        return self.size * self.tokens.shared * self.hf.hidden_size

    def layer(self, is_moe: bool, recompute: Recompute) -> int:
        """Of a decoder layer, with experts or dense, of which something is computed again."""
        if recompute == "full":
            return self.states
        modules = recompute if isinstance(recompute, tuple) else ()
        norm = self._norm_recomputed if "layernorm" in modules and not self._fused(is_moe) else self._norm
        first = self._norm_recomputed if "layernorm" in modules and self.kernels == "torch" else self._norm
        return (
            first() + self._attention("core_attn" in modules) + norm()
            + (self._moe(modules) if is_moe else self._dense("mlp" in modules))
        )  # fmt: skip

    def prediction(self) -> int:
        """Of one multi-token prediction layer: two norms, both states side by side, a layer, a norm."""
        own_layer = self.layer(self.hf.is_moe_layer(self.hf.num_hidden_layers), self.model.recompute)
        return 3 * self._norm() + 2 * self.states + own_layer + self._head_input()

    def first_stage(self) -> int:
        """Of the embedding: ids, and with tensor parallelism which of them are elsewhere."""
        return self.tokens.own * (_INDEX + (1 if self.parallel.tensor > 1 else 0))

    def last_stage(self) -> int:
        """Of the final norm and the token losses."""
        return self._norm(output=False) + self._head_input()

    def row(self) -> int:
        """What all layers share: the row's order, and rotations where layers need not round them."""
        order = _INDEX * self.tokens.row if self.parallel.context > 1 else 0
        return order + (self._rotations(_WIDE) if self.size == _WIDE else 0)

    def _fused(self, is_moe: bool) -> bool:
        """Whether the second norm is a part of the linear layer behind it, which keeps what it keeps."""
        return self.kernels == "transformer-engine" and not is_moe

    def _norm(self, width: int | None = None, vectors: int | None = None, *, output: bool = True) -> int:
        """Input and scale; torch's also the normalised input, and in bf16 the input in fp32. And the output,
        which the linear layer behind it keeps."""
        width, vectors = width or self.hf.hidden_size, vectors or self.tokens.shared
        numbers = width * vectors
        kept = (_WIDE + self.size) * numbers if self.kernels == "torch" else self.size * numbers
        return kept + _WIDE * vectors + (self.size * numbers if output else 0)

    def _norm_recomputed(self) -> int:
        """The input; the output is given up too."""
        return self.states

    def _attention(self, recomputed: bool) -> int:
        """Between the norm's output and the layer's second norm."""
        hf, tokens, tensor = self.hf, self.tokens, self.parallel.tensor
        queries, keys = hf.num_attention_heads * hf.head_dim, hf.num_key_value_heads * hf.head_dim
        queries, keys = queries // tensor, keys // tensor
        norms = 0
        if hf.qk_norm:
            heads = (hf.num_attention_heads + hf.num_key_value_heads) // tensor
            norms = self._norm(hf.head_dim, heads * tokens.own, output=False)
        projected = self.size * tokens.own * (queries + 2 * keys)  # queries, keys and values side by side
        own_queries = self.size * tokens.own * queries
        output = own_queries  # of the core, which the output projection keeps
        if recomputed:
            own_keys = self.size * tokens.own * keys if hf.qk_norm else 0
            return norms + projected + own_queries + own_keys + output
        if self.parallel.context > 1:
            seen = self.size * tokens.row * 2 * keys  # gathered, keys beside values
        else:
            seen = self.size * tokens.own * keys + projected  # keys rotated, values as projected
        sums = _WIDE * tokens.own * hf.num_attention_heads // tensor
        rounded = 2 * self._rotations(self.size) if self.size < _WIDE else 0
        return norms + rounded + own_queries + seen + own_queries + sums + output

    def _rotations(self, size: int) -> int:
        """Cosine and sine of every token."""
        return 2 * size * self.tokens.own * self.hf.rotary_dim

    def _dense(self, recomputed: bool) -> int:
        return (
            0
            if recomputed
            else self._gated(self.tokens.own, self.hf.intermediate_size // self.parallel.tensor)
        )

    def _gated(self, tokens: int, width: int) -> int:
        """Gate and up side by side, the gate activated, up once more, their product."""
        return 5 * self.size * tokens * width

    def _moe(self, modules: tuple[str, ...]) -> int:
        moe, tokens = self.hf.moe, self.tokens
        assert moe is not None
        if "moe" in modules:
            return 0
        shared = 0
        if moe.shared_width and "shared_experts" not in modules:
            shared = self._gated(tokens.own, moe.shared_width // self.parallel.tensor)
        received = self.size * tokens.routed * self.hf.hidden_size + _WIDE * tokens.routed
        # Transformer Engine's experts weigh in a step of their own, and keep what they weigh once more.
        copies = self.size * tokens.routed * moe.width if self.kernels == "transformer-engine" else 0
        return shared + self._router(moe) + received + self._gated(tokens.routed, moe.width) + copies

    def _router(self, moe: MoeConfig) -> int:
        """Scores, and which experts were chosen, as ids, as a map, and as places."""
        all_scores = moe.scores == "sigmoid" or not moe.normalized
        chosen = (_INDEX + _WIDE + _INDEX) * moe.top_k + (_WIDE if moe.scores == "sigmoid" else 0)
        of_experts = (_WIDE if all_scores else 0) + 1 + _WIDE
        return self.tokens.shared * (chosen + of_experts * moe.experts)

    def _head_input(self) -> int:
        return self.size * self.tokens.own * self.hf.hidden_size
