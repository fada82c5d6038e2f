"""Rows of whole samples: every sample once an epoch, none cut, few tokens free, the same plan everywhere."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qtarget_megatron.data import Packing, RowDataset
from qtarget_megatron.data.order import SampleOrder, shares
from qtarget_megatron.data.rows import WINDOW, EvaluationRows, RowPlan, alignment, balance, first_fit_decreasing


def least_bins(lengths, capacity):
    """By trying: the fewest bins that hold all lengths."""
    for count in range(1, len(lengths) + 1):
        for choice in itertools.product(range(count), repeat=len(lengths)):
            used = [0] * count
            for length, place in zip(lengths, choice, strict=True):
                used[place] += length
            if max(used) <= capacity:
                return count


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_bins_hold_each_index_once_and_are_few(lengths):
    bins = first_fit_decreasing(np.array(lengths), 20)
    assert sorted(itertools.chain(*bins)) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in one) <= 20 and sorted(one) == list(one) for one in bins)
    assert len(bins) <= 11 / 9 * least_bins(lengths, 20) + 1


def log_normal(count, seed=0, longest=2000):
    """Lengths of chat data: 50 to 2,000 tokens, most of them a few hundred."""
    drawn = np.random.default_rng(seed).lognormal(np.log(300), 0.8, count)
    return np.clip(drawn, 50, longest).astype(np.int32)


def plan(lengths, row_length=2048, seed=7, shuffled=True):
    return RowPlan(SampleOrder([len(lengths)], seed=seed, shuffled=shuffled), lengths, row_length)


def fill(lengths, row_length=2048):
    return lengths.sum() / (len(plan(lengths, row_length).epoch(0)) * row_length)


def rows_of(rows):
    return [row.tolist() for row in (rows[i] for i in range(len(rows)))]


def test_every_epoch_has_every_sample_once():
    lengths = log_normal(2 * WINDOW + 300)
    made = plan(lengths)
    for number in (0, 1):
        rows = made.epoch(number)
        assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
        assert max(lengths[row].sum() for row in (rows[i] for i in range(len(rows)))) <= 2048
    assert rows_of(made.epoch(0)) != rows_of(made.epoch(1))


def test_few_tokens_stay_free():
    lengths = log_normal(10_000)
    assert fill(lengths) > 0.99
    assert fill(np.full(100, 1025)) == pytest.approx(1025 / 2048)


def test_the_plan_depends_on_lengths_seed_and_epoch_alone():
    lengths = log_normal(500)
    first, again = plan(lengths), plan(lengths)
    # Asked for in another order, as after a resume.
    assert rows_of(again.epoch(3)) == rows_of(first.epoch(3)) and rows_of(again.epoch(0)) == rows_of(first.epoch(0))
    assert rows_of(plan(lengths, seed=8).epoch(0)) != rows_of(first.epoch(0))


def test_rows_are_counted_over_epochs():
    lengths = log_normal(300)
    made, resumed = plan(lengths), plan(lengths)
    expected = [*rows_of(made.epoch(0)), *rows_of(made.epoch(1)), *rows_of(made.epoch(2))]
    late = len(expected) - 2
    assert resumed[late].tolist() == expected[late]
    found = [made[i].tolist() for i in range(len(expected))]
    assert found == expected
    # A worker may ask for what lies before.
    assert made[0].tolist() == expected[0] and made[late].tolist() == expected[late]


def test_long_and_short_rows_are_mixed():
    """The algorithm begins with the longest samples; training does not."""
    lengths = log_normal(WINDOW)
    rows = plan(lengths).epoch(0)
    longest = np.array([lengths[rows[i]].max() for i in range(len(rows))])
    half = len(rows) // 2
    assert longest[:half].mean() == pytest.approx(longest[half:].mean(), rel=0.1)


@pytest.mark.parametrize(
    ("row", "size", "expected"),
    [(64, 1, 8), (64, 2, 8), (64, 4, 8), (64, 8, 16), (48, 3, 6), (60, 1, 4), (60, 2, 4), (61, 1, 1), (60, 4, 8)],
)
def test_samples_begin_where_context_parallelism_can_cut(row, size, expected):
    assert alignment(row, size) == expected and (size == 1 or expected % (2 * size) == 0)


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match="expected samples of at most 100 tokens, got one of 101"):
        plan(np.array([3, 101]), 100)
    with pytest.raises(ValueError, match="expected one sample or more of each source, got"):
        plan(np.array([], dtype=np.int32))


# ---- several sources


def test_without_weights_an_epoch_has_every_sample_of_every_source_once():
    order = SampleOrder([5, 30, 1], seed=3)
    for number in (0, 1):
        assert sorted(order.epoch(number).tolist()) == list(range(36))
    assert order.epoch(0).tolist() != order.epoch(1).tolist()


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5), st.integers(1, 500))
def test_shares_are_whole_and_nearest_to_the_weights(weights, total):
    found = shares(weights, total)
    assert sum(found) == total
    for share, weight in zip(found, weights, strict=True):
        assert abs(share - total * weight / sum(weights)) < 1


def test_weighted_sources_go_on_where_the_epoch_before_left_them():
    """10 of 30 samples in the share 2 of 3, so that it comes twice an epoch; 20 in the share 1 of 3: half of it."""
    order = SampleOrder([10, 20], [2, 1], seed=5)
    assert len(order) == 30
    first, second, third = (order.epoch(number) for number in range(3))
    for epoch in (first, second, third):
        assert (epoch < 10).sum() == 20 and (epoch >= 10).sum() == 10
        assert sorted(epoch[epoch < 10].tolist()) == sorted([*range(10), *range(10)])
    both = np.concatenate([first[first >= 10], second[second >= 10]])
    assert sorted(both.tolist()) == list(range(10, 30)), "two epochs are a pass through the larger source"
    assert set(third[third >= 10].tolist()) != set(first[first >= 10].tolist()), "the next pass is in another order"
    # Rows of it, as a training has them.
    lengths = log_normal(30)
    rows = RowPlan(order, lengths, 2048).epoch(1)
    assert sorted(rows.samples.tolist()) == sorted(second.tolist())


# ---- evaluations and balance


@pytest.mark.parametrize("multiple", [1, 4, 7, 64])
@pytest.mark.parametrize("row_length", [2048, None])
def test_an_evaluation_has_every_sample_once_in_a_multiple_of_rows(multiple, row_length):
    lengths = log_normal(50)
    made = EvaluationRows(lengths, row_length, multiple=multiple)
    assert len(made) % multiple == 0 and sorted(made.rows.samples.tolist()) == list(range(50))
    filled = [made[i] for i in range(len(made))]
    assert all(lengths[row].sum() <= 2048 for row in filled)
    assert sum(len(row) == 0 for row in filled) == max(len(made) - 50, 0), "empty only where samples are too few"
    assert made[len(made)].tolist() == made[0].tolist()


def test_an_evaluation_of_some_rows_takes_the_first():
    lengths = np.full(40, 500)
    made = EvaluationRows(lengths, 2048, multiple=4, limit=4)
    assert sorted(made.rows.samples.tolist()) == list(range(16))


def test_balance_is_the_slowest_rank_against_the_mean():
    costs = np.array([1.0, 3, 1, 3, 2, 2, 2, 2, 9])
    # Steps of 4 rows on 2 ranks: 2 against 6, then 4 against 4; what is left is no step.
    assert balance(costs, ranks=2, batch=4) == pytest.approx((6 / 4 + 1) / 2)
    assert balance(costs, ranks=1, batch=4) == 1


def test_epochs_are_counted_in_rows():
    lengths = log_normal(300)
    made = plan(lengths)
    first, second = len(made.epoch(0)), len(made.epoch(1))
    assert made.rows_of(1) == first and made.rows_of(2) == first + second
    assert made.rows_of(1.5) == first + -(-second // 2)
    assert RowPlan(SampleOrder([7]), np.ones(7), None).rows_of(2.5) == 14 + 4


# ---- rows as tensors


class Numbers:
    """Samples whose tokens are their number; of as many tokens as lengths say."""

    def __init__(self, lengths):
        self.lengths = lengths

    def item(self, index, length):
        own = self.lengths[index]
        tokens = torch.cat([torch.full((own,), index), torch.full((length - own,), 99)])
        padding = torch.arange(length) >= own
        return {
            "tokens": tokens,
            "position_ids": torch.arange(length),
            "padding": padding,
            "sample": torch.tensor(index),
        }

    def empty(self, length):
        return self.item(0, length) | {"padding": torch.ones(length, dtype=torch.bool), "sample": torch.tensor(-1)}


@pytest.mark.parametrize(("step", "length"), [(None, 64), (16, 48), (40, 40), (24, 48)])
def test_a_row_is_no_longer_than_it_has_to_be(step, length):
    """Three samples take 8 + 16 + 16 tokens of a row of 64."""
    lengths = np.array([5, 16, 9])
    data = RowDataset(
        Numbers(lengths), [np.array([0, 1, 2])], 64, num_rows=1, pad_id=99, packing=Packing(lengths, 8, step)
    )
    item = data[0]
    rest = length - 40
    assert item["tokens"].tolist() == [0] * 5 + [99] * 3 + [1] * 16 + [2] * 9 + [99] * (7 + rest)
    assert item["position_ids"].tolist() == [*range(8), *range(16), *range(16), *range(rest)]
    assert item["sample"].tolist() == [0] * 5 + [-1] * 3 + [1] * 16 + [2] * 9 + [-1] * (7 + rest)
    assert (item["sample"] < 0).tolist() == item["padding"].tolist()


def test_a_row_without_samples_is_padding():
    lengths = np.array([5, 16])
    rows = EvaluationRows(lengths, 64, multiple=4)
    data = RowDataset(Numbers(lengths), rows, 64, num_rows=4, pad_id=99, packing=Packing(lengths, 8))
    items = [data[i] for i in range(4)]
    assert [item["sample"].max().item() for item in items] == [0, 1, -1, -1]
    assert all(item["sample"].shape == (64,) and item["tokens"].shape == (64,) for item in items)
