"""Bootstrap intervals and verdicts of the study against numbers by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from examples.study.results import pack, unpack
from examples.study.statistics import Interval, paired_difference, spread


def test_no_difference_is_a_tie_of_width_0():
    right = np.array([[1, 0, 1], [0, 0, 1]])
    assert paired_difference(right, right) == Interval(0.0, 0.0, 0.0)
    assert paired_difference(right, right).verdict == "tie"


def test_difference_of_every_problem_has_no_spread():
    one, other = np.ones((3, 4)), np.zeros((3, 4))
    assert paired_difference(one, other) == pytest.approx((1, 1, 1))
    assert paired_difference(one, other).verdict == "win"
    assert paired_difference(other, one).verdict == "loss"


def test_interval_of_one_problem_in_two_by_hand():
    """One seed, two problems, differences 1 and 0: a mean is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    found = paired_difference(np.array([[1, 1]]), np.array([[0, 1]]), level=0.8)
    assert found == Interval(0.5, 0.0, 1.0)
    # Both ends lie within the middle half.
    assert paired_difference(np.array([[1, 1]]), np.array([[0, 1]]), level=0.4) == Interval(0.5, 0.5, 0.5)


def test_interval_is_of_all_pairs_of_resamples():
    """Of 3 seeds and 3 problems the distribution can be counted: 27 x 27 equally likely pairs of resamples."""
    differences = np.array([[1, 0, -1], [1, 1, 0], [0, 1, 0]])
    resamples = list(itertools.product(range(3), repeat=3))
    means = [differences[np.ix_(seeds, problems)].mean() for seeds in resamples for problems in resamples]
    low, high = np.quantile(means, [0.05, 0.95])
    found = paired_difference(differences, np.zeros((3, 3)), draws=200_000, level=0.9)
    assert found.mean == pytest.approx(1 / 3)
    # Means are ninths: a quantile is exact unless it lies next to a step of the distribution.
    assert found.low == pytest.approx(low, abs=1e-9) and found.high == pytest.approx(high, abs=1e-9)


def test_seeds_that_disagree_widen_the_interval():
    """The same share of wins, by problems or by seeds: five seeds say less than a hundred problems."""
    by_problems = np.zeros((5, 100))
    by_problems[:, :60] = 1
    by_seeds = np.zeros((5, 100))
    by_seeds[:3] = 1
    narrow, wide = (paired_difference(values, np.zeros((5, 100))) for values in (by_problems, by_seeds))
    assert narrow.mean == wide.mean == pytest.approx(0.6)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_an_interval_that_touches_0_is_a_tie():
    assert Interval(0.1, 0.0, 0.2).verdict == "tie"
    assert Interval(-0.1, -0.2, 0.0).verdict == "tie"
    assert Interval(0.1, 1e-6, 0.2).verdict == "win"


def test_shapes_that_do_not_belong_together_are_refused():
    with pytest.raises(ValueError, match=r"expected two \[seeds, problems\] of one shape, got \(1, 2\) and \(2, 1\)"):
        paired_difference(np.zeros((1, 2)), np.zeros((2, 1)))


def test_spread_by_hand():
    assert spread(np.array([1.0, 2.0, 3.0])) == (2.0, 1.0)
    assert np.isnan(spread(np.array([1.0]))[1])


@pytest.mark.parametrize("right", [[], [True], [True, False, True, False, True], [False] * 17, [0.25, 1.0, 0.5]])
def test_outcomes_survive_packing(right):
    assert unpack(pack(right)).tolist() == right


def test_packed_outcomes_by_hand():
    assert pack([True, False, True, False, True]) == "5:a8"
