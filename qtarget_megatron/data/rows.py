"""Which samples share a row of training: whole samples, as many as fit, planned from their lengths alone.

The plan of an epoch depends on the lengths, the seed and the number of the epoch, so that it is the same on every rank,
at every layout, and when a training resumes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

# Samples among which rows are filled: enough that few tokens stay free, few enough that an epoch stays shuffled.
WINDOW = 4096
# Every sample begins at a multiple of this, at any layout: context parallelism cuts each one into 2 C parts.
ALIGNMENT = 8


def alignment(context_parallel_size: int) -> int:
    """What a sample's tokens are filled up to a multiple of: the same for the usual sizes of context parallelism."""
    parts = 2 * context_parallel_size
    return ALIGNMENT if ALIGNMENT % parts == 0 else parts


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch.

    samples: [n] indices, row by row. begins: [rows + 1], where each row begins among them.
    """

    samples: np.ndarray
    begins: np.ndarray

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Indices of the samples of a row."""
        return self.samples[self.begins[row] : self.begins[row + 1]]


class RowPlan:
    """The rows of a training, epoch by epoch.

    lengths:    [n] tokens of each sample, none above row_length.
    row_length: tokens of a row.
    shuffled:   whether every epoch has another order.
    """

    def __init__(self, lengths: np.ndarray, row_length: int, *, seed: int, shuffled: bool):
        if len(lengths) == 0:
            raise ValueError("expected one sample or more, got none")
        if lengths.max() > row_length:
            raise ValueError(f"expected samples of at most {row_length} tokens, got one of {lengths.max()}")
        self._lengths, self._row_length = lengths, row_length
        self._seed, self._shuffled = seed, shuffled
        self._ends: list[int] = []
        self._known: tuple[int, EpochRows] | None = None

    def epoch(self, number: int) -> EpochRows:
        """The rows of an epoch, counted from 0. An epoch of 1,000,000 samples takes seconds to plan."""
        if self._known is None or self._known[0] != number:
            self._known = number, self._planned(number)
        return self._known[1]

    def __getitem__(self, item: int) -> np.ndarray:
        """Indices of the samples of a training's row, counted over all epochs."""
        while not self._ends or self._ends[-1] <= item:
            rows = len(self.epoch(len(self._ends)))
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))
        # The last epochs are asked for most.
        number = next(e for e in reversed(range(len(self._ends))) if e == 0 or self._ends[e - 1] <= item)
        return self.epoch(number)[item - (self._ends[number - 1] if number else 0)]

    def _planned(self, number: int) -> EpochRows:
        count = len(self._lengths)
        generator = np.random.Generator(np.random.PCG64([self._seed, number]))
        order = generator.permutation(count) if self._shuffled else np.arange(count)
        rows: list[np.ndarray] = []
        for begin in range(0, count, WINDOW):
            filled = first_fit_decreasing(self._lengths[order[begin : begin + WINDOW]], self._row_length)
            # Rows of long samples come first out of the algorithm.
            places = generator.permutation(len(filled)) if self._shuffled else range(len(filled))
            rows += [order[begin + filled[place]] for place in places]
        begins = np.fromiter(itertools.accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
        return EpochRows(np.concatenate(rows), begins)


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Bins of the indices of lengths, each index once and in ascending order, none above capacity.

    Longest first, each into the first bin with room for it. Bins: at most 11/9 of the least number, and 1
    (Johnson 1973).
    """
    free = np.empty(len(lengths), dtype=np.int64)
    bins: list[list[int]] = []
    for index in np.argsort(-lengths.astype(np.int64), kind="stable").tolist():
        length = int(lengths[index])
        room = free[: len(bins)] >= length
        place = int(room.argmax()) if room.any() else len(bins)
        if place == len(bins):
            bins.append([])
            free[place] = capacity
        bins[place].append(index)
        free[place] -= length
    return [np.array(sorted(one), dtype=np.int64) for one in bins]
