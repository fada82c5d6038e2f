"""What a teacher from elsewhere is, and how its word is checked sample by sample."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from qtarget_megatron.data import EncodedSample
from qtarget_megatron.teacher_cache import SampleEntries, context_digests

# How far above 0 a log-probability may be by the rounding of whoever has compressed it.
_ROUNDING = 1e-2


class TeacherSource(Protocol):
    """Where the entries of a cache come from.

    name:      of the teacher, for the cache's header.
    made_from: a digest of what it is; a run that goes on must have the same.
    precision: of its log-probabilities, in words.
    k:         entries of each token, or the most of them with top_p.
    top_p:     tokens have fewer entries, where these reach the mass; None: all have k.
    parallel:  samples that may be asked for at a time, from several threads.
    repeats:   whether asking again says something new, as of a server.
    """

    name: str
    made_from: str
    precision: str
    k: int
    top_p: float | None
    parallel: int
    repeats: bool

    def entries(self, index: int, sample: EncodedSample) -> SampleEntries:
        """Those of record `index`, which has supervised tokens. ValueError, one line, where they cannot be had."""


def entries_of(index: int, sample: EncodedSample, ids: np.ndarray, log_p: np.ndarray) -> SampleEntries:
    """The entries of sample index from ids int [n, k] and log_p [n, k], in any order, -inf where there is none.

    Probabilities that add up to more than 1, by the rounding of whoever wrote them, are divided by their sum.
    ValueError for what are no log-probabilities, and for an id that comes twice at a place or is negative.
    """
    order = np.argsort(-log_p, axis=1, kind="stable")
    ids = np.take_along_axis(np.asarray(ids, dtype=np.int64), order, axis=1)
    log_p = np.take_along_axis(np.asarray(log_p, dtype=np.float64), order, axis=1)
    if log_p.size and not log_p.max() <= _ROUNDING:  # NaN as well
        raise ValueError(
            f"sample {index}: expected log-probabilities, 0 or less, got {log_p.max():.4g}: logits are none"
        )
    there = np.where(np.isfinite(log_p), ids, -1 - np.arange(ids.shape[1]))
    if (ids[np.isfinite(log_p)] < 0).any() or (np.diff(np.sort(there, axis=1), axis=1) == 0).any():
        raise ValueError(f"sample {index}: a token id comes twice at a place, or is negative")
    total = np.exp(log_p).sum(1)
    log_p -= np.log(np.maximum(total, 1.0))[:, None]
    kept = np.isfinite(log_p)
    tail = np.maximum(1.0 - np.exp(log_p).sum(1), 0.0)
    context = context_digests(sample.input_ids, sample.supervised)
    ids = np.where(kept, ids, 0)
    return SampleEntries(ids, log_p.astype(np.float32), kept.sum(1), tail.astype(np.float32), context)


def predicted_from(sample: EncodedSample) -> np.ndarray:
    """int64 [n], for each supervised token the place of the token before it, whose logits predict it."""
    return np.flatnonzero(sample.supervised) - 1


def distance(one: SampleEntries, other: SampleEntries) -> float:
    """Mean over the tokens of the total variation of two teachers' kept probabilities and tails, 0 to 1."""
    total = 0.0
    for token in range(len(one.tail)):
        masses: dict[int, float] = {-1: float(one.tail[token]) - float(other.tail[token])}
        for entries, sign in ((one, 1.0), (other, -1.0)):
            count = int(entries.counts[token])
            for index, log_p in zip(
                entries.ids[token][:count].tolist(), entries.log_p[token][:count].tolist(), strict=True
            ):
                masses[index] = masses.get(index, 0.0) + sign * float(np.exp(log_p))
        total += sum(abs(mass) for mass in masses.values()) / 2
    return total / max(len(one.tail), 1)


def label_shares(sample: EncodedSample, entries: SampleEntries) -> np.ndarray:
    """int64 [4]: of how many supervised tokens the token before, the token itself and the one behind it is among the
    kept entries, and how many there are. A teacher knows most of the token itself."""
    found = np.zeros(4, dtype=np.int64)
    places, length = np.flatnonzero(sample.supervised), len(sample.input_ids)
    for token, place in enumerate(places.tolist()):
        kept = set(entries.ids[token][: int(entries.counts[token])].tolist())
        for column, near in enumerate((place - 1, place, place + 1)):
            found[column] += 0 <= near < length and int(sample.input_ids[near]) in kept
    found[3] = len(places)
    return found
