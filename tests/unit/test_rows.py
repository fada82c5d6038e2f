"""Rows of whole samples: every sample once an epoch, none cut, few tokens free, the same plan everywhere."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtarget_megatron.data.rows import WINDOW, RowPlan, alignment, first_fit_decreasing


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
    return RowPlan(lengths, row_length, seed=seed, shuffled=shuffled)


def fill(lengths, row_length=2048):
    return lengths.sum() / (len(plan(lengths, row_length).epoch(0)) * row_length)


def rows_of(rows):
    return [row.tolist() for row in (rows[i] for i in range(len(rows)))]


@pytest.mark.parametrize("shuffled", [True, False])
def test_every_epoch_has_every_sample_once(shuffled):
    lengths = log_normal(2 * WINDOW + 300)
    made = plan(lengths, shuffled=shuffled)
    for number in (0, 1):
        rows = made.epoch(number)
        assert sorted(rows.samples.tolist()) == list(range(len(lengths)))
        assert max(lengths[row].sum() for row in (rows[i] for i in range(len(rows)))) <= 2048
    same = rows_of(made.epoch(0)) == rows_of(made.epoch(1))
    assert same != shuffled


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


@pytest.mark.parametrize(("size", "expected"), [(1, 8), (2, 8), (4, 8), (8, 16), (3, 6)])
def test_samples_begin_where_context_parallelism_can_cut(size, expected):
    assert alignment(size) == expected and expected % (2 * size) == 0


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match="expected samples of at most 100 tokens, got one of 101"):
        plan(np.array([3, 101]), 100)
    with pytest.raises(ValueError, match="got none"):
        plan(np.array([], dtype=np.int32))
