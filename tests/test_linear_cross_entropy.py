"""Token losses by chunks against torch's own cross-entropy: values, gradients, ranks, memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_klong.config import ParallelConfig
from megatron_klong.model.linear_cross_entropy import linear_cross_entropy
from megatron_klong.platform import Platform
from tests.ranks import RankPool

ONE = ParallelConfig()
SCORED = {"none": 0.0, "some": 0.4, "all": 1.0}


@dataclass
class Case:
    """Inputs, and the gradients of the token losses."""

    hidden_TH: Tensor
    weight_VH: Tensor
    labels_T: Tensor
    scored_T: Tensor
    gradient_T: Tensor


@dataclass
class Answer:
    """Losses and gradients in fp64; None where there is no gradient."""

    losses_T: Tensor
    hidden_TH: Tensor | None
    weight_VH: Tensor | None

    def parts(self) -> list[Tensor]:
        assert self.hidden_TH is not None and self.weight_VH is not None
        return [self.losses_T, self.hidden_TH, self.weight_VH]


def case(tokens: int = 11, vocabulary: int = 24, hidden: int = 5, scored: float = 0.4, seed: int = 0) -> Case:
    """In fp64, of values that bf16 has; labels of tokens that are not scored are no ids."""
    draw = torch.Generator().manual_seed(seed)
    scored_T = torch.rand(tokens, generator=draw) < scored
    labels_T = torch.randint(vocabulary, (tokens,), generator=draw)
    return Case(
        torch.randn(tokens, hidden, generator=draw).bfloat16().double(),
        torch.randn(vocabulary, hidden, generator=draw).bfloat16().double(),
        torch.where(scored_T, labels_T, -100),
        scored_T,
        torch.randn(tokens, generator=draw).double(),
    )


Losses = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_torch(hidden_TH: Tensor, weight_VH: Tensor, labels_T: Tensor, scored_T: Tensor) -> Tensor:
    """All logits at once, in fp32 at least, as Megatron does."""
    logits_TV = functional.linear(hidden_TH, weight_VH)
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    labels_T = labels_T.where(scored_T, -100)
    return functional.cross_entropy(logits_TV, labels_T, reduction="none", ignore_index=-100)


def by_chunks(chunk_tokens: int, group: Any = None) -> Losses:
    return lambda *inputs: linear_cross_entropy(*inputs, chunk_tokens, group)


def answer(
    losses_of: Losses, given_case: Case, dtype: torch.dtype = torch.float64, frozen: tuple[str, ...] = ()
) -> Answer:
    hidden_TH = given_case.hidden_TH.to(dtype, copy=True).requires_grad_("hidden" not in frozen)
    weight_VH = given_case.weight_VH.to(dtype, copy=True).requires_grad_("weight" not in frozen)
    losses_T = losses_of(hidden_TH, weight_VH, given_case.labels_T, given_case.scored_T)
    assert losses_T.dtype == torch.promote_types(dtype, torch.float32)
    losses_T.backward(given_case.gradient_T.to(losses_T.dtype))
    for each in (hidden_TH, weight_VH):
        assert each.grad is None or each.grad.dtype is dtype
    gradients = [
        None if each.grad is None else each.grad.double() for each in (hidden_TH, weight_VH)
    ]  # fmt: skip
    return Answer(losses_T.detach().double(), *gradients)


def assert_same(found: Answer, expected: Answer, tolerance: float = 1e-12) -> None:
    for one, other in zip(found.parts(), expected.parts(), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("scored", SCORED.values(), ids=SCORED)
@pytest.mark.parametrize("chunk_tokens", [1, 3, 11, 50])
def test_losses_and_gradients_equal_torch(chunk_tokens: int, scored: float) -> None:
    inputs = case(scored=scored)
    assert_same(answer(by_chunks(chunk_tokens), inputs), answer(by_torch, inputs))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 20), st.integers(1, 30), st.integers(1, 8), st.floats(0, 1), st.integers(1, 25),
    st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_equals_torch(
    tokens: int, vocabulary: int, hidden: int, scored: float, chunk_tokens: int, seed: int
) -> None:
    inputs = case(tokens, vocabulary, hidden, scored, seed)
    assert_same(answer(by_chunks(chunk_tokens), inputs), answer(by_torch, inputs))


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = case(tokens=6, vocabulary=7, hidden=3, scored=0.7)
    assert torch.autograd.gradcheck(
        lambda hidden_TH, weight_VH: linear_cross_entropy(
            hidden_TH, weight_VH, inputs.labels_T, inputs.scored_T, 2
        ),
        (inputs.hidden_TH.requires_grad_(), inputs.weight_VH.requires_grad_()),
    )


def test_without_scored_tokens_gradients_are_zeros_and_not_missing() -> None:
    found = answer(by_chunks(4), case(scored=0.0))
    assert all(bool((part == 0).all()) for part in found.parts())


def test_other_tokens_take_no_part() -> None:
    inputs = case(scored=0.5)
    expected = answer(by_chunks(3), inputs)
    inputs.hidden_TH[~inputs.scored_T] = math.nan
    inputs.gradient_T[~inputs.scored_T] = math.nan
    assert_same(answer(by_chunks(3), inputs), expected, tolerance=0)


def test_the_gradient_may_depend_on_the_losses() -> None:
    inputs = case(scored=1.0)

    def objective(losses_of: Losses) -> Losses:
        return lambda *given_inputs: (-losses_of(*given_inputs)).exp().clamp(max=0.1)

    assert_same(answer(objective(by_chunks(4)), inputs), answer(objective(by_torch), inputs))


@pytest.mark.parametrize("chunk_tokens", [1, 16, 128])
@pytest.mark.parametrize("seed", range(3))
def test_bf16_is_no_worse_than_the_plain_way(chunk_tokens: int, seed: int) -> None:
    inputs = case(tokens=128, vocabulary=512, hidden=64, scored=0.8, seed=seed)
    inputs.weight_VH = (inputs.weight_VH * 0.25).bfloat16().double()
    truth = answer(by_torch, inputs, torch.float32).parts()
    plain = answer(by_torch, inputs, torch.bfloat16).parts()
    found = answer(by_chunks(chunk_tokens), inputs, torch.bfloat16).parts()
    for true, one, other in zip(truth, found, plain, strict=True):
        error, allowed = ((each - true).norm() / true.norm() for each in (one, other))
        # The rounding that both do is not to the last bit the same.
        assert error <= 1.01 * allowed
        assert 0 < allowed < 1e-2


def test_of_mixed_types_each_gradient_has_its_own() -> None:
    inputs = case(scored=1.0)
    hidden_TH = inputs.hidden_TH.float().requires_grad_()
    weight_VH = inputs.weight_VH.bfloat16().requires_grad_()
    losses_T = linear_cross_entropy(hidden_TH, weight_VH, inputs.labels_T, inputs.scored_T, 4)
    losses_T.sum().backward()
    assert losses_T.dtype is torch.float32
    assert hidden_TH.grad is not None and hidden_TH.grad.dtype is torch.float32
    assert weight_VH.grad is not None and weight_VH.grad.dtype is torch.bfloat16


@pytest.mark.parametrize("frozen", ["weight", "hidden"])
def test_what_is_frozen_gets_no_gradient_and_costs_none(frozen: str) -> None:
    inputs, whole = case(scored=1.0), answer(by_torch, case(scored=1.0))
    with Allocations() as all_made:
        answer(by_chunks(4), inputs)
    with Allocations() as made:
        found = answer(by_chunks(4), inputs, frozen=(frozen,))
    chunks = 3
    assert all_made.products - made.products == chunks
    kept = "hidden" if frozen == "weight" else "weight"
    name = {"hidden": "hidden_TH", "weight": "weight_VH"}
    assert getattr(found, name[frozen]) is None
    torch.testing.assert_close(getattr(found, name[kept]), getattr(whole, name[kept]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits(dtype: torch.dtype) -> None:
    inputs = case(tokens=64, vocabulary=96, hidden=4, scored=1.0)
    inputs.weight_VH *= 2.0**12
    logits_TV = inputs.hidden_TH @ inputs.weight_VH.T
    assert logits_TV.max() > 1e4 and logits_TV.min() < -1e4
    found = answer(by_chunks(10), inputs, dtype)
    assert all(bool(part.isfinite().all()) for part in found.parts())
    if dtype is torch.float32:
        assert_same(found, answer(by_torch, inputs), tolerance=2e-3)


def test_large_maxima_do_not_blur_the_gradient() -> None:
    """Logits of 1e4 and more whose differences fp32 holds exactly: log-sum-exp itself it would not."""
    offsets_V = torch.tensor([0.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    ones_T1 = torch.ones(1, 2, dtype=torch.float64)
    weight_VH = torch.stack((torch.full((4,), 2.0**14, dtype=torch.float64), offsets_V), dim=1)
    inputs = Case(ones_T1, weight_VH, torch.tensor([1]), torch.tensor([True]), torch.ones(1))
    found = answer(by_chunks(1), inputs, torch.float32)
    expected_V = offsets_V.softmax(0) - torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert found.weight_VH is not None
    torch.testing.assert_close(found.weight_VH[:, 1], expected_V, rtol=1e-6, atol=1e-6)


class Allocations(TorchDispatchMode):
    """What operations make anew: how many elements each, and how many products of matrices there are."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []
        self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        inputs = [each for each in tree_leaves((args, kwargs)) if _is(each)]
        memory = {each.untyped_storage().data_ptr() for each in inputs}
        self.elements += [
            each.numel()
            for each in tree_leaves(made)
            if _is(each) and each.untyped_storage().data_ptr() not in memory
        ]
        self.products += "mm" in func.overloadpacket.__name__
        return made


def _is(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() > 0


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 2)])
def test_no_more_than_a_chunk_of_logits_is_made(dtype: torch.dtype, copies: int) -> None:
    tokens, vocabulary, chunk_tokens = 64, 512, 8
    inputs = case(tokens, vocabulary, hidden=4, scored=1.0)
    with Allocations() as made:
        answer(by_chunks(chunk_tokens), inputs, dtype)
    assert max(made.elements) == chunk_tokens * vocabulary
    # In forward and in backward, each in place after.
    chunks = tokens // chunk_tokens
    assert made.elements.count(chunk_tokens * vocabulary) == 2 * copies * chunks
    with Allocations() as made:
        answer(by_torch, inputs, dtype)
    assert max(made.elements) == tokens * vocabulary


def test_only_scored_tokens_are_computed() -> None:
    inputs = case(tokens=64, vocabulary=512, hidden=4, scored=0.2)
    count = int(inputs.scored_T.sum())
    assert 0 < count < 32
    with Allocations() as made:
        answer(by_chunks(64), inputs)
    assert max(made.elements) == count * 512


def test_one_rank_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[object] = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *given: met.append(given))
    answer(by_chunks(3), case(scored=1.0))
    assert met == []


def on_rank(platform: Platform, inputs: Case, chunk_tokens: int, dtype: torch.dtype) -> tuple[Answer, int]:
    """Of this rank's part of the vocabulary, and how many collectives there were."""
    group = parallel_state.get_tensor_model_parallel_group()
    inputs.weight_VH = inputs.weight_VH.chunk(group.size())[group.rank()]
    calls, original = [], torch.distributed.all_reduce

    def counted(*arguments: Any) -> None:
        calls.append(arguments)
        original(*arguments)

    torch.distributed.all_reduce = counted
    try:
        found = answer(by_chunks(chunk_tokens, group), inputs, dtype)
    finally:
        torch.distributed.all_reduce = original
    return found, len(calls)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("tensor", "scored"), [(1, 1.0), (2, 0.4), (4, 1.0), (4, 0.0)])
def test_ranks_equal_one(ranks: RankPool, tensor: int, scored: float, dtype: torch.dtype) -> None:
    inputs, chunk_tokens = case(scored=scored), 3
    answers = ranks.run(
        on_rank, ParallelConfig(tensor=tensor), tensor, inputs=inputs, chunk_tokens=chunk_tokens, dtype=dtype
    )
    expected = answer(by_chunks(chunk_tokens), inputs, dtype)
    parts = [found for found, _ in answers]
    for found in parts:
        assert torch.equal(found.losses_T, parts[0].losses_T)
    together = Answer(
        parts[0].losses_T,
        torch.stack([found.parts()[1] for found in parts]).sum(0),
        torch.cat([found.parts()[2] for found in parts]),
    )
    assert_same(together, expected, tolerance=1e-12 if dtype is torch.float64 else 1e-5)
    chunks = math.ceil(int(inputs.scored_T.sum()) / chunk_tokens)
    assert {calls for _, calls in answers} == {2 * chunks if tensor > 1 else 0}


def test_ranks_with_extreme_logits(ranks: RankPool) -> None:
    """The maximum is that of all ranks: with their own, the others' exponentials would be infinite."""
    inputs = case(scored=1.0)
    inputs.weight_VH *= 2.0**12
    answers = ranks.run(
        on_rank, ParallelConfig(tensor=2), 2, inputs=inputs, chunk_tokens=4, dtype=torch.float32
    )
    expected = answer(by_torch, inputs)
    for found, _ in answers:
        torch.testing.assert_close(found.losses_T, expected.losses_T, rtol=1e-5, atol=2e-3)
        assert all(bool(part.isfinite().all()) for part in found.parts())
