"""Paired differences with bootstrap intervals, and what they say: a win, a loss, or a tie."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

DRAWS, LEVEL = 10_000, 0.95


class Interval(NamedTuple):
    """A mean with the interval that holds its bootstrap means, LEVEL of them."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """win: above 0 as a whole; loss: below; tie: it holds 0."""
        return "win" if self.low > 0 else "loss" if self.high < 0 else "tie"


def paired_difference(
    one: np.ndarray, other: np.ndarray, *, draws: int = DRAWS, level: float = LEVEL, seed: int = 0
) -> Interval:
    """The mean of one - other, of the same seeds and problems.

    one, other: [seeds, problems]; of a number for each seed [seeds, 1].

    Seeds and problems are drawn anew with replacement, each for itself: a problem is the same one for all seeds, and a
    seed for all problems (the pigeonhole bootstrap, Owen 2007). The interval is of the means' percentiles, so that with
    one seed it says nothing of other seeds.
    """
    if one.shape != other.shape or one.ndim != 2 or not one.size:
        raise ValueError(f"expected two [seeds, problems] of one shape, got {one.shape} and {other.shape}")
    differences = one.astype(float) - other.astype(float)
    seeds, problems = differences.shape
    of_seeds, of_problems = _weights(seeds, problems, draws, seed)
    means = ((of_seeds @ differences) * of_problems).sum(1)
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    # A sum of products is no exact 0 where every difference is.
    low, high = (0.0 if abs(bound) < 1e-12 else float(bound) for bound in (low, high))
    return Interval(float(differences.mean()), low, high)


@lru_cache(maxsize=4)
def _weights(seeds: int, problems: int, draws: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The share of each seed [draws, seeds], and of each problem [draws, problems], in each draw."""
    draw = np.random.default_rng(seed)
    return (
        draw.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds,
        draw.multinomial(problems, np.full(problems, 1 / problems), size=draws) / problems,
    )


def spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation of a sample; of one value the deviation is NaN."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")
