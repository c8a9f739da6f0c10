"""Token losses from hidden states, without the logits of all tokens at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, ReduceOp


def linear_cross_entropy(
    hidden_TH: Tensor,
    weight_VH: Tensor,
    labels_T: Tensor,
    scored_T: Tensor,
    chunk_tokens: int,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Negative log-likelihood of each token's label, in nats, ``[T]``: fp32, of fp64 weights fp64.

    The loss of token t is ``log(sum_v exp(z_tv)) - z_ty`` with logits ``z_tv = weight_v . hidden_t`` and y
    its label. Only scored tokens are computed, ``chunk_tokens`` at a time: agents are trained on a small
    part of their tokens. The loss of the others is 0, and no gradient comes of them.

    No chunk's logits are kept. Backward computes them anew, one product with the head more than the plain
    way has: what the gradients are made of, the gradients of the token losses, is known only then (an
    objective of reinforcement learning depends on the log-probs themselves), so that they cannot be made
    in forward. Beside inputs and results, the most memory is one chunk's logits in fp32, and of a bf16 head
    also the same in bf16 and the head's gradient in fp32 (twice on CUDA). Of each token a label, a maximum
    and a sum are kept.

    Args:
        hidden_TH: fp32, bf16 or fp64, of all tokens of the tensor-parallel ranks. Its gradient is this
            rank's summand, of its part of the vocabulary: whoever gathered the tokens sums over the ranks.
        weight_VH: this rank's part of the head, ``[V / TP, H]``; the first rank has the first ids. Logits
            are products in its dtype, and its gradient is summed over chunks in fp32 (fp64 of fp64).
        labels_T: int64 ids in the whole vocabulary, which is not checked; of tokens that are not scored,
            anything.
        scored_T: bool, the same on all ranks of the group, which so meet in the same collectives: two for
            each chunk forward, none backward. Their number is read, so the host waits for the device once.
        chunk_tokens: scored tokens whose logits are held at once.
        group: the tensor-parallel ranks; None stands for one rank alone.
    """
    assert chunk_tokens > 0
    if group is not None and group.size() == 1:
        group = None
    losses_T: Tensor = _LinearCrossEntropy.apply(
        hidden_TH, weight_VH, labels_T, scored_T, chunk_tokens, group
    )
    return losses_T


class _LinearCrossEntropy(torch.autograd.Function):
    """S stands for scored tokens, C for those of a chunk, V for this rank's part of the vocabulary."""

    @staticmethod
    def forward(
        context: Any, hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scored_T: Tensor,
        chunk_tokens: int, group: ProcessGroup | None,
    ) -> Tensor:  # fmt: skip
        vocabulary = weight_VH.size(0)
        places_S = scored_T.nonzero().squeeze(1)
        targets_S = labels_T[places_S] - (group.rank() * vocabulary if group else 0)
        wide = torch.promote_types(weight_VH.dtype, torch.float32)
        losses_T = hidden_TH.new_zeros(hidden_TH.size(0), dtype=wide)
        largest_S, sums_S = losses_T.new_empty((2, places_S.size(0)))
        for chunk in _chunks(places_S, chunk_tokens):
            places_C = places_S[chunk]
            values_CV = _logits(hidden_TH, weight_VH, places_C).to(wide)
            largest_C = values_CV.amax(1)
            if group:
                torch.distributed.all_reduce(largest_C, ReduceOp.MAX, group)
            values_CV.sub_(largest_C[:, None])
            ids_C1, here_C1 = _here(targets_S[chunk], vocabulary)
            target_C = values_CV.gather(1, ids_C1).masked_fill_(~here_C1, 0).squeeze(1)
            both_2C = torch.stack((values_CV.exp_().sum(1), target_C))
            # Before the next chunk's are made.
            del values_CV
            if group:
                torch.distributed.all_reduce(both_2C, ReduceOp.SUM, group)
            sum_C, target_C = both_2C
            losses_T[places_C] = sum_C.log() - target_C
            # Apart, since the logarithm of the sum would round to what large maxima leave of it.
            largest_S[chunk], sums_S[chunk] = largest_C, sum_C
        context.save_for_backward(hidden_TH, weight_VH, places_S, targets_S, largest_S, sums_S)
        context.chunk_tokens = chunk_tokens
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_TH, weight_VH, places_S, targets_S, largest_S, sums_S = context.saved_tensors
        vocabulary, wide = weight_VH.size(0), largest_S.dtype
        hidden_gradient_TH = torch.zeros_like(hidden_TH) if context.needs_input_grad[0] else None
        weight_gradient_VH = torch.zeros_like(weight_VH, dtype=wide) if context.needs_input_grad[1] else None
        for chunk in _chunks(places_S, context.chunk_tokens):
            places_C = places_S[chunk]
            gradient_C1 = gradient_T[places_C, None]
            logits_CV = _logits(hidden_TH, weight_VH, places_C)
            # (softmax - onehot) * gradient, in place.
            values_CV = logits_CV.to(wide)
            values_CV.sub_(largest_S[chunk, None]).exp_().mul_(gradient_C1 / sums_S[chunk, None])
            ids_C1, here_C1 = _here(targets_S[chunk], vocabulary)
            values_CV.scatter_add_(1, ids_C1, -gradient_C1.masked_fill(~here_C1, 0))
            # Rounded into the logits' memory; where they are the same tensor, nothing happens.
            logits_CV.copy_(values_CV)
            if hidden_gradient_TH is not None:
                hidden_gradient_TH[places_C] = (logits_CV @ weight_VH).to(hidden_TH.dtype)
            if weight_gradient_VH is not None:
                hidden_CH = hidden_TH[places_C].to(weight_VH.dtype)
                _add_product(weight_gradient_VH, logits_CV, values_CV, hidden_CH)
            del logits_CV, values_CV
        if weight_gradient_VH is not None:
            weight_gradient_VH = weight_gradient_VH.to(weight_VH.dtype)
        return hidden_gradient_TH, weight_gradient_VH, None, None, None, None


def _add_product(sum_VH: Tensor, low_CV: Tensor, wide_CV: Tensor, hidden_CH: Tensor) -> None:
    """Add a chunk's weight gradient, ``low_CV.T @ hidden_CH``, not rounded to bf16 as a product of bf16 is.

    Rounded in every chunk, the sum would be a tenth worse than from one product over all tokens.
    """
    if low_CV.is_cuda and low_CV.dtype is not wide_CV.dtype:
        sum_VH.add_(torch.mm(low_CV.T, hidden_CH, out_dtype=wide_CV.dtype))
    else:
        # Nothing but CUDA multiplies bf16 to fp32.
        sum_VH.addmm_(wide_CV.T, hidden_CH.to(wide_CV.dtype))


def _chunks(places_S: Tensor, chunk_tokens: int) -> Iterator[slice]:
    for start in range(0, places_S.size(0), chunk_tokens):
        yield slice(start, start + chunk_tokens)


def _logits(hidden_TH: Tensor, weight_VH: Tensor, places_C: Tensor) -> Tensor:
    """``[C, V]`` in the weight's dtype; twice the same for the same places."""
    return hidden_TH[places_C].to(weight_VH.dtype) @ weight_VH.T


def _here(targets_C: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Ids ``[C, 1]`` within this rank's part, and whether the target is there; if not, the id is any."""
    here_C = (targets_C >= 0) & (targets_C < vocabulary)
    return targets_C.clamp(0, vocabulary - 1)[:, None], here_C[:, None]
