"""Which parallel layouts the tests train at: every pair of choices that can meet, in as few runs as a greedy search
finds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence


def covering(factors: Mapping[str, Sequence], valid: Callable[[dict], bool], cost: Callable[[dict], int]) -> list[dict]:
    """Rows with a value of each factor, such that every pair of values that some valid row has is in one of them.

    Of the rows with the most pairs that are still missing, the cheapest one is taken, then the first: the same ones on
    every machine.
    """
    rows = [
        row for values in itertools.product(*factors.values()) if valid(row := dict(zip(factors, values, strict=True)))
    ]
    rows.sort(key=cost)
    missing = set().union(*map(pairs, rows))
    chosen = []
    while missing:
        best = max(rows, key=lambda row: len(pairs(row) & missing))  # the first of the best ones
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def pairs(row: dict) -> set:
    """The pairs of choices that a row has."""
    return set(itertools.combinations(row.items(), 2))
