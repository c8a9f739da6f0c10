"""Packing and rows: nothing lost, nothing seen twice, the bound is a bound."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_klong.data.packing import minimum_rows, pack_rows
from megatron_klong.data.rows import PackedRows, SampleName, balanced, fill_row
from megatron_klong.data.windows import TrainingSample

lengths_and_row = st.integers(1, 40).flatmap(
    lambda row: st.tuples(st.lists(st.integers(1, row), max_size=40), st.just(row))
)


@settings(max_examples=300, deadline=None)
@given(lengths_and_row, st.integers(0, 3))
def test_every_sample_stands_in_one_row_that_holds_it(case: tuple[list[int], int], seed: int) -> None:
    lengths, row_tokens = np.array(case[0], dtype=np.int64), case[1]
    rows = pack_rows(lengths, row_tokens, seed)
    assert sorted(itertools.chain.from_iterable(row.tolist() for row in rows)) == list(range(len(lengths)))
    assert all(lengths[row].sum() <= row_tokens for row in rows)
    assert len(rows) >= minimum_rows(lengths, row_tokens)
    again = pack_rows(lengths, row_tokens, seed)
    assert [row.tolist() for row in again] == [row.tolist() for row in rows]


def fewest_rows(lengths: list[int], row_tokens: int) -> int:
    """By trying every assignment."""
    best = len(lengths)

    def place(index: int, rooms: list[int]) -> None:
        nonlocal best
        if len(rooms) >= best and index < len(lengths):
            return
        if index == len(lengths):
            best = min(best, len(rooms))
            return
        for place_in in {
            room: number for number, room in enumerate(rooms) if room >= lengths[index]
        }.values():
            rooms[place_in] -= lengths[index]
            place(index + 1, rooms)
            rooms[place_in] += lengths[index]
        place(index + 1, [*rooms, row_tokens - lengths[index]])

    place(0, [])
    return best


@settings(max_examples=200, deadline=None)
@given(
    st.integers(2, 20).flatmap(lambda row: st.tuples(st.lists(st.integers(1, row), max_size=7), st.just(row)))
)
def test_the_bound_never_exceeds_the_optimum(case: tuple[list[int], int]) -> None:
    lengths, row_tokens = case
    optimum = fewest_rows(lengths, row_tokens)
    assert (
        -(-sum(lengths) // row_tokens)
        <= minimum_rows(np.array(lengths, dtype=np.int64), row_tokens)
        <= optimum
    )


def test_the_bound_sees_what_the_sum_does_not() -> None:
    assert minimum_rows(np.array([6, 6, 6]), 10) == 3  # the sum alone says 2
    assert minimum_rows(np.array([7, 7, 4, 4]), 10) == 3  # neither 4 goes beside a 7
    assert minimum_rows(np.full(8, 21), 100) == 2
    assert minimum_rows(np.full(9, 21), 100) == 3  # no five of 21 share 100, though 9 x 21 < 200
    assert minimum_rows(np.full(10, 20), 100) == 2  # but five of 20 do


def test_another_seed_gives_other_rows() -> None:
    lengths = np.full(60, 10)
    first, second = pack_rows(lengths, 30, 0), pack_rows(lengths, 30, 1)
    assert len(first) == len(second) == 20
    assert [row.tolist() for row in first] != [row.tolist() for row in second]


@given(st.integers(1, 5), st.lists(st.floats(0, 100), max_size=40))
def test_ranks_take_equally_many_rows_of_equal_cost(ways: int, drawn: list[float]) -> None:
    costs = [cost for cost in drawn for _ in range(ways)] if len(drawn) % ways else drawn
    taken = balanced(costs, ways)
    assert sorted(row for rank in taken for row in rank) == list(range(len(costs)))
    assert len({len(rank) for rank in taken}) == 1
    # However costs are spread, no rank has more than another by more than the dearest row.
    sums = [sum(costs[row] for row in rank) for rank in taken]
    assert max(sums) - min(sums) <= max(costs, default=0) + 1e-6


def test_the_balance_is_by_cost_not_by_number() -> None:
    costs = [100.0, 1, 1, 1, 100, 1, 1, 1]
    sums = [sum(costs[row] for row in rank) for rank in balanced(costs, 2)]
    assert sums == [103, 103]
    assert sum(costs[0::2]) == 202  # what taking turns would have given one rank


def test_a_sample_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.row_tokens=10 is less than a sample of 11"):
        pack_rows(np.array([3, 11]), 10, 0)


def test_a_row_by_hand() -> None:
    def sample(tokens: list[int], mask: list[int], window: int) -> TrainingSample:
        return TrainingSample(np.array(tokens), np.array(mask, dtype=bool), 4, window)

    row = fill_row([sample([5, 6, 7], [0, 0, 1], 0), sample([8, 9], [1, 1], 1)], 8)
    assert row.tokens_R.tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert row.labels_R.tolist() == [6, 7, 0, 9, 0, 0, 0, 0]
    # 7 is predicted from 6. The first token of a sample (8) is predicted by nothing.
    assert row.loss_mask_R.tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 8]
    assert (row.samples, row.sample_tokens) == (((4, 0), (4, 1)), 5)
    assert fill_row([], 4).cu_seqlens.tolist() == [0, 4]
    assert fill_row([sample([1, 2], [0, 1], 0)], 2).cu_seqlens.tolist() == [0, 2]


class Numbered:
    """Samples that say which they are."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths, dtype=np.int64)

    def epoch(self, number: int) -> Numbered:
        return self

    def name(self, index: int) -> SampleName:
        return index, 0

    def packable(self, index: int) -> TrainingSample:
        length = int(self.lengths[index])
        return TrainingSample(np.full(length, index), np.ones(length, dtype=bool), index, 0)


def test_epochs_hold_every_sample_once_and_differ() -> None:
    source = Numbered([5, 9, 3, 8, 2, 7, 7, 1, 6, 4] * 3)
    rows = PackedRows(source, 12, seed=3)
    epochs: dict[int, list[SampleName]] = {}
    for position in range(3 * rows.rows_per_epoch):
        epochs.setdefault(rows.epoch(position), []).extend(rows.row(position).samples)
    assert sorted(epochs[0]) == sorted(epochs[1]) == [(index, 0) for index in range(30)]
    assert epochs[0] != epochs[1]


def test_a_row_depends_on_its_number_alone() -> None:
    source = Numbered([5, 9, 3, 8, 2, 7] * 5)
    forward = [PackedRows(source, 12, seed=3).row(position).samples for position in range(60)]
    rows = PackedRows(source, 12, seed=3)
    backward = [rows.row(position).samples for position in reversed(range(60))]
    assert forward == backward[::-1]


def test_rows_with_an_end_are_counted_and_empty_behind_it() -> None:
    source = Numbered([5, 9, 3, 8, 2, 7] * 5)
    rows = PackedRows(source, 12, seed=3, passes=2)
    names = [name for position in range(rows.total) for name in rows.row(position).samples]
    assert sorted(names) == sorted([(index, 0) for index in range(30)] * 2)
    assert [name for position in range(rows.total) for name in rows.names(position)] == names
    behind = rows.row(rows.total)
    assert (behind.samples, behind.units, rows.cost(rows.total), rows.names(rows.total)) == ((), 0, 0.0, ())


def test_attended_pairs_by_hand() -> None:
    # A token sees itself and those before it in its sample: 1 + 2 + 3 of the first, 1 + 2 of the second.
    samples = [TrainingSample(np.zeros(n, dtype=np.int64), np.ones(n, dtype=bool), 0, 0) for n in (3, 2)]
    assert fill_row(samples, 9).attended_pairs == 9
    assert fill_row(samples, 5).attended_pairs == 9
    assert fill_row([], 5).attended_pairs == 0
