"""Several teacher caches of the same data as one teacher: the weighted mean of their distributions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qtarget_megatron.data import EncodedSample
from qtarget_megatron.teacher_cache import SampleEntries, TeacherCache
from qtarget_megatron.teacher_sources.source import entries_of

TAILS = ("uniform", "drop")


class Ensemble:
    """p(k) = sum_i w_i p_i(k), of which the k largest are kept; their tail is what is left of 1.

    weights: above 0, divided by their sum; default the same for all.
    k:       at most the smallest of the caches', the default.
    tail:    what a cache counts as at a token that it does not keep: "uniform", its tail shared evenly by all of these,
             as a training with --teacher-tail uniform takes it, or "drop", 0.

    ValueError for fewer than two caches, and for those that were not made from the same data, tokenizer, chat template,
    date and --seq-length.
    """

    precision = "of its members"
    top_p: float | None = None
    parallel, repeats = 1, False

    def __init__(
        self,
        directories: Sequence[Path],
        weights: Sequence[float] | None = None,
        *,
        k: int | None = None,
        tail: str = "uniform",
    ):
        if len(directories) < 2:
            raise ValueError(f"--cache: expected two caches or more, got {len(directories)}")
        weights = [1.0] * len(directories) if weights is None else list(weights)
        if len(weights) != len(directories) or not all(0 < weight < np.inf for weight in weights):
            raise ValueError(f"--weights: expected {len(directories)} numbers above 0, one a cache, got {weights}")
        if tail not in TAILS:
            raise ValueError(f"--tail: expected {' or '.join(TAILS)}, got {tail!r}")
        self._caches = [TeacherCache(directory) for directory in directories]
        self._weights = [weight / sum(weights) for weight in weights]
        self._tail = tail
        headers = [cache.header for cache in self._caches]
        for header, directory in zip(headers[1:], directories[1:], strict=True):
            for name in ("data", "tokenizer", "chat_template", "date", "seq_length"):
                if getattr(header, name) != getattr(headers[0], name):
                    raise ValueError(
                        f"teacher caches {directories[0]} and {directory} differ in their {name.replace('_', ' ')}: "
                        "write them from the same data with the same flags"
                    )
        smallest = min(header.k for header in headers)
        self.k = smallest if k is None else k
        if not 0 < self.k <= smallest:
            raise ValueError(f"--k: expected 1 to {smallest}, the fewest that a cache keeps, got {k}")
        self.vocab_size = min(header.vocab_size for header in headers)
        self.header = headers[0]
        self.name = " + ".join(f"{w:.3g} {h.teacher}" for w, h in zip(self._weights, headers, strict=True))
        made_from = [[header.identity for header in headers], self._weights, tail]
        self.made_from = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()

    def entries(self, index: int, sample: EncodedSample) -> SampleEntries:
        members = [cache.sample(index, sample.input_ids, sample.supervised) for cache in self._caches]
        count = len(members[0][2])
        ids, log_p = np.full((count, self.k), -1), np.full((count, self.k), -np.inf)
        for token in range(count):
            kept = [row_ids[token][row_ids[token] >= 0] for row_ids, _, _ in members]
            known = np.unique(np.concatenate(kept))
            mean = np.zeros(len(known))
            for weight, own, (_, row, tails) in zip(self._weights, kept, members, strict=True):
                rest = 0.0
                if self._tail == "uniform":
                    rest = float(tails[token]) / max(self.vocab_size - len(own), 1)
                p = np.full(len(known), rest)
                p[np.searchsorted(known, own)] = np.exp(row[token][: len(own)].astype(np.float64))
                mean += weight * p
            best = np.argsort(-mean, kind="stable")[: self.k]
            ids[token, : len(best)], log_p[token, : len(best)] = known[best], np.log(np.maximum(mean[best], 1e-300))
        found = entries_of(index, sample, ids, log_p)
        if (found.counts < self.k).any():
            raise ValueError(
                f"sample {index}: the caches keep {int(found.counts.min())} tokens together, expected {self.k}: caches "
                "that were written with --top-p need a smaller --k"
            )
        return found
