"""Which samples an epoch has, and in which order: they depend on the sources' sizes and weights, seed and epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class SampleOrder:
    """The samples of one or several sources, epoch by epoch; numbered source behind source.

    counts:   samples of each source.
    weights:  shares of the sources in an epoch, above 0, in any unit. An epoch then has as many samples as the sources
              have together; each source goes on where the epoch before left it, and begins again, in another order,
              when it is through. None: every epoch has each sample once.
    seed:     of the orders.
    shuffled: whether there are any; else samples come as they are numbered.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[float] | None = None, *, seed: int = 0, shuffled: bool = True
    ):
        if seed < 0:
            raise ValueError(f"seed: expected 0 or more, got {seed}")
        if min(counts, default=0) < 1:
            raise ValueError(f"expected one sample or more of each source, got {list(counts)}")
        self._begins = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._seed, self._shuffled = seed, shuffled
        self._shares = None if weights is None else shares(weights, int(self._begins[-1]))

    def __len__(self) -> int:
        """Samples of an epoch."""
        return int(self._begins[-1])

    def epoch(self, number: int) -> np.ndarray:
        """int64 [n], the samples of an epoch, counted from 0."""
        generator = self.generator(number)
        if self._shares is None:
            return generator.permutation(len(self)) if self._shuffled else np.arange(len(self))
        drawn = np.concatenate(
            [self._drawn(source, number * share, share) for source, share in enumerate(self._shares)]
        )
        return generator.permutation(drawn) if self._shuffled else drawn

    def generator(self, *numbers: int) -> np.random.Generator:
        """Random numbers that depend on the seed and these numbers only."""
        return np.random.Generator(np.random.PCG64([self._seed, *numbers]))

    def _drawn(self, source: int, first: int, count: int) -> np.ndarray:
        """As many samples of a source, from the first of all that it ever gives."""
        begin, size = int(self._begins[source]), int(self._begins[source + 1] - self._begins[source])
        passes = []
        for turn in range(first // size, -(-(first + count) // size)):
            order = self.generator(turn, source, size).permutation(size) if self._shuffled else np.arange(size)
            passes.append(order[max(first - turn * size, 0) : first + count - turn * size])
        return begin + np.concatenate(passes) if passes else np.empty(0, np.int64)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to weights, of this sum (largest remainders)."""
    exact = np.array(weights, dtype=np.float64) * (total / sum(weights))
    whole = np.floor(exact).astype(np.int64)
    for source in np.argsort(whole - exact, kind="stable")[: total - int(whole.sum())]:
        whole[source] += 1
    return [int(share) for share in whole]
