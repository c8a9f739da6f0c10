"""The model over packed rows: a pipeline stage of it, and all that a rank has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_klong.model.attention import RotaryTable
from megatron_klong.model.linear_cross_entropy import linear_cross_entropy
from megatron_klong.model.row import RowLayout, Target


class RowModel(GPTModel):
    """Megatron's GPT over packed rows: their layout says positions and targets, nothing is derived.

    Args (beside Megatron's):
        rotary: tables of position embedding, made once for a row and used by every layer.
        loss_chunk_tokens: tokens whose logits exist at a time.
        trains_prediction: whether multi-token prediction layers are trained; if not, they are held and saved
            as they are, and never computed.
    """

    def __init__(
        self, *, rotary: RotaryTable, loss_chunk_tokens: int, trains_prediction: bool, **options: object
    ) -> None:
        super().__init__(position_embedding_type="none", **options)
        self.rotary = rotary
        self.loss_chunk_tokens = loss_chunk_tokens
        self.temperature = 1.0
        """Of sampling, that logits are divided by."""
        self.trains_prediction = trains_prediction
        self.computes_prediction = trains_prediction and self.mtp_process
        """On this pipeline stage."""
        self.prediction_loss_sum: Tensor | float = 0.0
        """Of this rank's tokens since it was last set to 0, without its weight."""
        if self.mtp_process and not trains_prediction:
            self.mtp.requires_grad_(False)

    def forward(
        self,
        tokens_1T: Tensor,
        row: RowLayout,
        target: Target | None = None,
        predicted: Sequence[Target] = (),
    ) -> Tensor:
        """Token losses, fp32 ``[1, T]``, 0 where nothing is trained; on all but the last pipeline stage the
        hidden states.

        Args:
            tokens_1T: int64, of this context-parallel rank.
            target: the next tokens. Without it the logits are returned, of this tensor-parallel rank's part
                of the vocabulary, ``[1, T, V / TP]``.
            predicted: the targets of multi-token prediction, by depth. Their losses are added to the
                gradient, not to the result.
        """
        assert row.positions_T is not None
        row = replace(
            row, rotary_T1D=self.rotary(row.positions_T), padding_1T=self._own_share(row.padding_1T)
        )  # fmt: skip
        embedded = self.embedding(input_ids=tokens_1T, position_ids=None) if self.pre_process else None
        hidden: Tensor = self.decoder(
            hidden_states=embedded, attention_mask=None, packed_seq_params=row, padding_mask=row.padding_1T
        )
        if not self.post_process:
            return hidden
        if self.computes_prediction and self.training and torch.is_grad_enabled():
            hidden = self._with_prediction(hidden, row, predicted)
        if target is not None:
            return self._token_losses(hidden, target)
        logits, _ = self.output_layer(self._cooled(hidden), weight=self._head())
        return logits.transpose(0, 1)

    def _cooled(self, hidden: Tensor) -> Tensor:
        return hidden if self.temperature == 1.0 else hidden / self.temperature

    def _head(self) -> Tensor:
        """The output layer's weight, ``[V / TP, H]``."""
        tied = self.share_embeddings_and_output_weights
        return self.shared_embedding_or_output_weight() if tied else self.output_layer.weight

    def _token_losses(self, hidden: Tensor, target: Target) -> Tensor:
        """Of hidden states ``[T, 1, H]`` (with sequence parallelism, this rank's share of them)."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=True, group=group
            )
        return linear_cross_entropy(
            self._cooled(hidden).squeeze(1), self._head(), target.labels_1T.squeeze(0),
            target.loss_mask_1T.squeeze(0) > 0, self.loss_chunk_tokens, group,
        ).unsqueeze(0)  # fmt: skip

    def _own_share(self, padding_1T: Tensor | None) -> Tensor | None:
        """With sequence parallelism, of the tokens that this rank's routers see."""
        if padding_1T is None or not self.config.sequence_parallel:
            return padding_1T
        group = self.pg_collection.tp
        return padding_1T.chunk(group.size(), dim=1)[group.rank()]

    def _with_prediction(self, hidden: Tensor, row: RowLayout, predicted: Sequence[Target]) -> Tensor:
        """The hidden states as they are, with the gradient of the prediction losses tied to them."""
        scale = self.config.mtp_loss_scaling_factor / len(self.mtp.layers)
        states = hidden
        for layer, target in zip(self.mtp.layers, predicted, strict=True):
            states, _, _ = layer(
                input_ids=None, position_ids=None, hidden_states=states, attention_mask=None,
                packed_seq_params=row, embedding=self.embedding,
            )  # fmt: skip
            losses = self._token_losses(states, target)
            self.prediction_loss_sum += losses.detach().sum() / len(self.mtp.layers)
            hidden = MTPLossAutoScaler.apply(hidden, losses * scale)
        return hidden


class RankModel(torch.nn.ModuleList):
    """A rank's part of the model: its pipeline stages, which are one unless they are interleaved.

    Args:
        stages: in the order of the layers.
    """

    def __init__(self, stages: Sequence[RowModel]) -> None:
        super().__init__(stages)
        self.config: TransformerConfig = stages[0].config

    def __iter__(self) -> Iterator[RowModel]:
        return super().__iter__()  # type: ignore[return-value]

    def __getitem__(self, place: int) -> RowModel:  # type: ignore[override]
        return super().__getitem__(place)  # type: ignore[return-value]
