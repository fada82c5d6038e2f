"""Which samples share a row of training: whole samples, as many as fit, planned from their lengths alone.

The plan of an epoch depends on the lengths, the seed and the number of the epoch, so that it is the same on every rank,
at every layout, and when a training resumes.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qtarget_megatron.data.order import SampleOrder

# Samples among which rows are filled: enough that few tokens stay free, few enough that an epoch stays shuffled.
WINDOW = 4096
# Every sample begins at a multiple of this, at any layout: context parallelism cuts each one into 2 C parts.
_ALIGNMENT = 8


def alignment(row_length: int, context_parallel_size: int) -> int:
    """What a sample's tokens are filled up to a multiple of in packed rows: the same at the usual sizes of context
    parallelism."""
    unit, parts = math.gcd(_ALIGNMENT, row_length), 2 * context_parallel_size
    return unit if context_parallel_size == 1 or unit % parts == 0 else parts


@dataclass(frozen=True)
class EpochRows:
    """The rows of one epoch.

    samples: [n] indices, row by row. begins: [rows + 1], where each row begins among them.
    """

    samples: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[np.ndarray]) -> EpochRows:
        """These rows."""
        begins = np.fromiter(itertools.accumulate(map(len, rows), initial=0), np.int64, len(rows) + 1)
        return cls(np.concatenate([np.empty(0, np.int64), *rows]), begins)

    def __len__(self) -> int:
        return len(self.begins) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Indices of the samples of a row."""
        return self.samples[self.begins[row] : self.begins[row + 1]]

    def sums(self, values: np.ndarray) -> np.ndarray:
        """[rows], the sum of a value of each sample; 0 of a row without samples."""
        ends = np.concatenate([[0], np.cumsum(values[self.samples], dtype=np.float64)])
        return np.diff(ends[self.begins])


class Rows(Protocol):
    """Rows in the order in which they are read."""

    def __getitem__(self, item: int) -> np.ndarray:
        """Indices of the samples of a row."""


class RowPlan:
    """The rows of a training, epoch by epoch.

    order:      of the samples.
    lengths:    [n] tokens of each sample, none above row_length.
    row_length: tokens of a row; None: a sample has a row of its own.
    """

    def __init__(self, order: SampleOrder, lengths: np.ndarray, row_length: int | None):
        if row_length is not None and lengths.max() > row_length:
            raise ValueError(f"expected samples of at most {row_length} tokens, got one of {lengths.max()}")
        self._order, self._lengths, self._row_length = order, lengths, row_length
        self._ends: list[int] = []
        self._known: tuple[int, EpochRows] | None = None

    def epoch(self, number: int) -> EpochRows:
        """The rows of an epoch, counted from 0."""
        if self._known is None or self._known[0] != number:
            self._known = number, self._planned(number)
        return self._known[1]

    def rows_of(self, epochs: float) -> int:
        """Rows of as many epochs, a part of a row counted as one."""
        whole = math.floor(epochs)
        return self._end(whole) + math.ceil((epochs - whole) * len(self.epoch(whole)) if epochs > whole else 0)

    def __getitem__(self, item: int) -> np.ndarray:
        """Indices of the samples of a training's row, counted over all epochs."""
        while not self._ends or self._ends[-1] <= item:
            self._end(len(self._ends) + 1)
        # The last epochs are asked for most.
        number = next(e for e in reversed(range(len(self._ends))) if e == 0 or self._ends[e - 1] <= item)
        return self.epoch(number)[item - self._end(number)]

    def _end(self, epochs: int) -> int:
        """Rows of as many epochs together."""
        while len(self._ends) < epochs:
            number = len(self._ends)
            rows = len(self._order) if self._row_length is None else len(self.epoch(number))
            self._ends.append(rows + (self._ends[-1] if self._ends else 0))
        return self._ends[epochs - 1] if epochs else 0

    def _planned(self, number: int) -> EpochRows:
        order = self._order.epoch(number)
        if self._row_length is None:
            return EpochRows(order, np.arange(len(order) + 1))
        places = self._order.generator(number, 1)
        counts: list[np.ndarray] = []
        for begin in range(0, len(order), WINDOW):
            window = order[begin : begin + WINDOW]
            filled = first_fit_decreasing(self._lengths[window], self._row_length)
            # Rows of long samples come first out of the algorithm. In place: an array for each row would take more
            # than all else that is known of its samples.
            rows = [filled[place] for place in places.permutation(len(filled))]
            order[begin : begin + WINDOW] = window[np.concatenate(rows)]
            counts.append(np.fromiter(map(len, rows), np.int64, len(rows)))
        return EpochRows(order, np.concatenate([[0], np.cumsum(np.concatenate(counts))]))


class EvaluationRows:
    """The rows of an evaluation, which begins anew behind the last one: every sample once each time.

    The samples share as many rows as a multiple asks for, as evenly as whole samples allow; a row is empty only where
    there are fewer samples.
    """

    def __init__(self, lengths: np.ndarray, row_length: int | None, *, multiple: int, limit: int | None = None):
        """multiple: of rows. limit: rows of an evaluation; the samples of later ones are left out."""
        if row_length is None:
            rows: list[np.ndarray] = list(np.arange(len(lengths))[:, None])
        else:
            rows = []
            for begin in range(0, len(lengths), WINDOW):
                filled = first_fit_decreasing(lengths[begin : begin + WINDOW], row_length)
                rows += sorted((begin + row for row in filled), key=lambda row: int(row[0]))
        rows = rows[:limit]
        self.rows = EpochRows.of(_spread(rows, lengths, limit or -(-len(rows) // multiple) * multiple))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> np.ndarray:
        """Indices of the samples of a row, counted over all evaluations."""
        return self.rows[item % len(self.rows)]


def _spread(rows: list[np.ndarray], lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """The same samples in this many rows: the fullest ones are halved."""
    heap = [(-int(lengths[row].sum()), number, row) for number, row in enumerate(rows) if len(row) > 1]
    heapq.heapify(heap)
    done = [row for row in rows if len(row) == 1]
    numbers = itertools.count(len(rows))
    while heap and len(heap) + len(done) < count:
        _, _, row = heapq.heappop(heap)
        longest_first = row[np.argsort(-lengths[row], kind="stable")]
        for half in (np.sort(longest_first[0::2]), np.sort(longest_first[1::2])):
            if len(half) == 1:
                done.append(half)
            else:
                heapq.heappush(heap, (-int(lengths[half].sum()), next(numbers), half))
    spread = sorted([*done, *(row for _, _, row in heap)], key=lambda row: int(row[0]))
    return spread + [np.empty(0, np.int64)] * (count - len(spread))


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Bins of the indices of lengths, each index once and in ascending order, none above capacity.

    Longest first, each into the first bin with room for it, all of one length at a time. Bins: at most 11/9 of the
    least number, and 1 (Johnson 1973).
    """
    free = np.full(len(lengths), capacity, dtype=np.int64)
    places = np.empty(len(lengths), dtype=np.int64)
    used = 0
    for length, indices in _by_length(lengths):
        # As many as fit into each bin, in the bins' order; bins that are new take the rest.
        room = np.concatenate([free[:used] // length, np.full(len(indices), capacity // length)])
        ends = np.minimum(np.cumsum(room), len(indices))
        taken = np.diff(ends, prepend=0)
        filled = np.flatnonzero(taken)
        places[indices] = np.repeat(filled, taken[filled])
        free[filled] -= length * taken[filled]
        used = max(used, int(filled[-1]) + 1)
    order = np.argsort(places, kind="stable")
    return np.split(order, np.searchsorted(places[order], np.arange(1, used)))


def _by_length(lengths: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Each length, the longest first, with the indices that have it."""
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    values, begins = np.unique(-lengths[order].astype(np.int64), return_index=True)
    return zip((-values).tolist(), np.split(order, begins[1:]), strict=True)


def balance(costs: np.ndarray, ranks: int, batch: int) -> float:
    """How much longer the slowest of the data-parallel ranks takes than their mean: the mean over the steps of an epoch
    of max / mean.

    costs: [rows], of each row in order.
    ranks: that share a step.
    batch: rows of a step, of which a rank has every ``ranks``-th.
    """
    steps = len(costs) // batch
    if not steps:
        return 1.0
    of_ranks = costs[: steps * batch].reshape(steps, batch // ranks, ranks).sum(1)
    return float((of_ranks.max(1) / of_ranks.mean(1)).mean())
