"""One optimizer step, and one evaluation: the same functions for SFT and RL."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_klong.data.rows import PackedRow
from megatron_klong.model.router import balancing_sum, begin_batch, expert_biases
from megatron_klong.model.row_model import RankModel, RowModel
from megatron_klong.training.row_inputs import row_inputs, whole_row
from megatron_klong.training.trainer import Trainer

Row = TypeVar("Row", bound=PackedRow)

Objective = Callable[[Tensor, Row, Tensor], Tensor]
"""``(log_probs_R, row, loss_mask_R) -> the row's sum`` (a scalar to minimise). A step minimises the sum over
the global batch divided by the batch's units (see :class:`PackedRow`)."""


@dataclass(frozen=True)
class BatchSums:
    """A global batch: mean objective per unit, and the counts, as in `StepResult`."""

    loss: float
    trained_tokens: int
    tokens: int
    attended_pairs: int
    prediction_loss: float | None
    balancing_loss: float | None


@dataclass(frozen=True)
class StepResult:
    """What one step did, or would have done.

    Attributes:
        loss: objective of the global batch, over its units: for SFT the mean over trained tokens.
        trained_tokens: their number.
        tokens: all tokens of the batch's samples, padding excluded.
        attended_pairs: of a token and one that it sees.
        grad_norm: global gradient norm before clipping.
        learning_rate: that the step was taken with.
        prediction_loss: of multi-token prediction, per trained token and without its weight; None untrained.
        balancing_loss: of the routers, a mean over layers and micro-batches without its coefficient (1 where
            tokens are spread evenly); None without it.
        updated: whether the weights were changed.
    """

    loss: float
    trained_tokens: int
    tokens: int
    attended_pairs: int
    grad_norm: float
    learning_rate: float
    prediction_loss: float | None = None
    balancing_loss: float | None = None
    updated: bool = True

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient norm are numbers."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True)
class EvaluationResult:
    """Mean objective over the trained tokens of some rows."""

    loss: float
    trained_tokens: int


def finite(result: StepResult) -> bool:
    """Accepts a step whose loss and gradients are numbers.

    Raises:
        FloatingPointError: for any other.
    """
    if not result.is_finite:
        raise FloatingPointError(
            f"loss {result.loss} and gradient norm {result.grad_norm} are not finite; the weights are still "
            "those before this step. Lower optimizer.lr, or look at the batch"
        )
    return True


def train_step(
    trainer: Trainer,
    rows: Sequence[Row],
    objective: Objective[Row],
    accepts: Callable[[StepResult], bool] = finite,
) -> StepResult:
    """Forward, backward and one update over this data-parallel rank's rows of the global batch.

    Args:
        accepts: decides, on every rank alike, whether weights are updated; the schedule goes on either way.
    """
    trainer.model.train()
    trainer.zero_gradients()
    biases = [(bias, bias.clone()) for bias in expert_biases(trainer.model)]
    sums = forward_backward(trainer, rows, objective, forward_only=False)
    # Advanced before the update, so that the first step already has a rate above 0.
    trainer.scheduler.step(increment=1)
    trainer.optimizer.prepare_grads()
    result = StepResult(
        loss=sums.loss,
        trained_tokens=sums.trained_tokens,
        tokens=sums.tokens,
        attended_pairs=sums.attended_pairs,
        grad_norm=float(trainer.optimizer.get_grad_norm() or 0.0),
        learning_rate=float(trainer.optimizer.param_groups[0]["lr"]),
        prediction_loss=sums.prediction_loss,
        balancing_loss=sums.balancing_loss,
    )
    if not accepts(result):
        for bias, before in biases:  # Megatron has moved them with the gradients
            bias.copy_(before)
        return replace(result, updated=False)
    trainer.optimizer.step()
    return result


@torch.no_grad()
def evaluate(trainer: Trainer, rows: Sequence[Row], objective: Objective[Row]) -> EvaluationResult:
    """The same loss without gradients; all data-parallel ranks must bring equally many rows."""
    trainer.model.eval()
    sums = forward_backward(trainer, rows, objective, forward_only=True)
    return EvaluationResult(sums.loss, sums.trained_tokens)


def forward_backward(
    trainer: Trainer, rows: Sequence[Row], objective: Objective[Row], *, forward_only: bool
) -> BatchSums:
    """Run Megatron's pipeline schedule over the rows, one micro-batch each; they must be a multiple of
    ``ParallelConfig.micro_batch_divisor``.

    Unless ``forward_only``, gradients of the mean over the global batch's units are left in the model's
    buffers, summed over all ranks.
    """
    counted = _counts(trainer, rows)
    micro_batches = len(rows) * parallel_state.get_data_parallel_world_size()
    model = trainer.model
    begin_batch(model, counted.units / max(micro_batches, 1))
    for stage in model:
        stage.prediction_loss_sum = 0.0
    losses: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, trainer, objective),
        data_iterator=[iter(rows) for _ in model],  # every stage sees every row
        model=list(trainer.stages),
        num_microbatches=len(rows),
        seq_length=trainer.row_tokens,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    # Only the last stage knows the loss.
    total = torch.tensor(float(sum(losses)) if losses else 0.0, dtype=torch.float64, device=trainer.device)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group())
    stages = parallel_state.get_pipeline_model_parallel_group()
    torch.distributed.broadcast(total, parallel_state.get_pipeline_model_parallel_last_rank(), stages)
    prediction, balancing = _side_losses(model, micro_batches, counted.trained_tokens)
    return BatchSums(
        loss=float(total) / max(counted.units, 1),
        trained_tokens=counted.trained_tokens,
        tokens=counted.tokens,
        attended_pairs=counted.attended_pairs,
        prediction_loss=prediction,
        balancing_loss=balancing,
    )


def _side_losses(
    model: RankModel, micro_batches: int, trained_tokens: int
) -> tuple[float | None, float | None]:
    """What was added to the gradient beside the objective: of prediction layers, and of the routers."""
    has_prediction = model.config.mtp_num_layers and model[-1].trains_prediction
    has_balancing = bool(model.config.num_moe_experts) and model.config.moe_aux_loss_coeff > 0
    if not (model.training and torch.is_grad_enabled() and (has_prediction or has_balancing)):
        return None, None
    own = balancing_sum(model)
    device = next(model.parameters()).device
    prediction = torch.as_tensor(model[-1].prediction_loss_sum, dtype=torch.float64, device=device)
    balancing = torch.as_tensor(0.0 if own is None else own, dtype=torch.float64, device=device)
    both = torch.stack([prediction, balancing])
    data = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for group in (data, parallel_state.get_pipeline_model_parallel_group()):
        torch.distributed.all_reduce(both, group=group)
    torch.distributed.all_reduce(both[1:], group=parallel_state.get_tensor_model_parallel_group())
    layers = sum(model.config.moe_layer_freq)
    return (
        float(both[0]) / max(trained_tokens, 1) if has_prediction else None,
        float(both[1]) / (micro_batches * layers) if has_balancing else None,
    )


def _prediction_depth(model: RowModel) -> int:
    trains = model.computes_prediction and model.training and torch.is_grad_enabled()
    return model.config.mtp_num_layers if trains else 0


@dataclass(frozen=True)
class _Counts:
    """Of a global batch."""

    units: int
    trained_tokens: int
    tokens: int
    attended_pairs: int


def _counts(trainer: Trainer, rows: Sequence[PackedRow]) -> _Counts:
    own = [
        (row.units, int(row.loss_mask_R.sum()), row.sample_tokens, row.attended_pairs) for row in rows
    ] or [(0, 0, 0, 0)]  # fmt: skip
    sums = torch.tensor(own, dtype=torch.int64, device=trainer.device).sum(0)
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
    return _Counts(*sums.tolist())


def _forward_step(
    trainer: Trainer, objective: Objective[Row], rows: Iterator[Row], stage: DistributedDataParallel
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """Megatron's forward step: the model's output and how to make a loss of it."""
    trainer.on_row()
    row, device = next(rows), trainer.device
    inputs = row_inputs(row, _prediction_depth(stage.module), device)
    output = stage(inputs.tokens_1T, inputs.layout, inputs.target, inputs.predicted)

    def loss_of(token_losses_1T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask_R = torch.from_numpy(row.loss_mask_R).to(device)
        loss = objective(-whole_row(token_losses_1T.squeeze(0), inputs.layout), row, mask_R)
        # Megatron sums the units over data- and context-parallel ranks; one of a row's ranks counts them.
        units = row.units if parallel_state.get_context_parallel_rank() == 0 else 0
        return loss, torch.tensor(units, dtype=torch.int, device=device), loss.detach()

    return output, loss_of
