"""Rows of a DistillKit data set as a teacher: parquet files of token ids with the most likely tokens of each place.

    input_ids [n]             a sequence, or several that were packed, one behind another
    attention_mask [n]        of packed ones the number of each token's sequence, from 1 on
    compressed_logprobs       bytes of each place: the log-probabilities, and
    bytepacked_indices        the ids, as compression_config.yaml beside the files describes them; or
    token_ids, top_values     both as they are, of log-probabilities

Place p is of token p + 1. Rows are found by their tokens, whatever their order. The form of DistillKit's first version
(packed_indices, exact_values, coeffs) holds logits less their mean, from which no probability follows: it is refused.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qtarget_megatron.data import EncodedSample
from qtarget_megatron.teacher_cache import SampleEntries
from qtarget_megatron.teacher_sources.source import entries_of, predicted_from

_LENGTHS_AT_MOST = 1 << 20
_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
_CONFIG = "compression_config.yaml"
_COMPRESSED, _PLAIN = ("compressed_logprobs", "bytepacked_indices"), ("token_ids", "top_values")
_KEPT = 8


@dataclass(frozen=True)
class Bin:
    """Quantized residuals: a scale, then num_elements numbers of element_bits bits."""

    scale_dtype: str
    element_bits: int
    num_elements: int


@dataclass(frozen=True)
class Compression:
    """How the log-probabilities of a place are compressed, as DistillKit names it.

    Of k numbers, most likely first: exact_k as they are (exact_dtype), then the coefficients of a polynomial through
    the others over their places 0, 1, ... (normalize_t: over 0 to 1), and what it leaves, in bins. delta_encoding: of
    differences to the number before.
    """

    d: int
    k: int
    exact_k: int
    bins: tuple[Bin, ...]
    exact_dtype: str = "float32"
    terms: tuple[int | str, ...] = ()
    term_dtype: str = "float32"
    delta: bool = True
    normalize_t: bool = False

    @classmethod
    def read(cls, path: Path) -> Compression:
        """From the file that is written beside the rows. ValueError for one of another kind."""
        import yaml

        try:
            entries = yaml.safe_load(path.read_text())
            return cls(
                d=int(entries["d"]),
                k=int(entries["k"]),
                exact_k=int(entries["exact_k"]),
                bins=tuple(
                    Bin(_dtype(bin_["scale_dtype"]), int(bin_["element_bits"]), int(bin_["num_elements"]))
                    for bin_ in entries["residual_bins"]
                ),
                exact_dtype=_dtype(entries.get("exact_dtype", "float32")),
                terms=tuple(_term(term) for term in entries.get("polynomial_terms") or ()),
                term_dtype=_dtype(entries.get("term_dtype", "float32")),
                delta=bool(entries.get("delta_encoding", True)),
                normalize_t=bool(entries.get("normalize_t", False)),
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise ValueError(f"{path}: expected DistillKit's compression config, got {error!r}") from error

    def log_p(self, packed: np.ndarray) -> np.ndarray:
        """float64 [n, k] of bytes uint8 [n, m]."""
        place, rest = 0, self.k - self.exact_k

        def take(dtype: str, count: int) -> np.ndarray:
            nonlocal place
            size = _size(dtype) * count
            found = _floats(packed[:, place : place + size], dtype)
            place += size
            return found

        exact = take(self.exact_dtype, self.exact_k)
        others = np.zeros((len(packed), rest))
        if self.terms:
            t = np.linspace(0, 1, rest) if self.normalize_t else np.arange(rest, dtype=np.float64)
            powers = [t**term if isinstance(term, int) else getattr(np, term)(t) for term in self.terms]
            others += take(self.term_dtype, len(self.terms)) @ np.stack(powers)
        begin = 0
        for bin_ in self.bins:
            scale = take(bin_.scale_dtype, 1)
            size = math.ceil(bin_.element_bits * bin_.num_elements / 8)
            numbers = unpacked(packed[:, place : place + size], bin_.element_bits, bin_.num_elements)
            place += size
            lowest = -(2 ** (bin_.element_bits - 1))
            # One bit is a sign.
            steps = 2.0 * numbers - 1 if bin_.element_bits == 1 else numbers + float(lowest)
            others[:, begin : begin + bin_.num_elements] += steps * scale
            begin += bin_.num_elements
        if place != packed.shape[1]:
            raise ValueError(f"expected {place} bytes of a place by {_CONFIG}, got {packed.shape[1]}")
        found = np.concatenate([exact, others], axis=1)
        return found.cumsum(1) if self.delta else found

    def ids(self, packed: np.ndarray) -> np.ndarray:
        """int64 [n, k] of bytes uint8 [n, m]."""
        return unpacked(packed, max(math.ceil(math.log2(self.d)), 1), self.k)


def _dtype(name: Any) -> str:
    if name not in (*_FLOATS, "bfloat16"):
        raise ValueError(f"dtype {name!r}")
    return str(name)


def _term(term: Any) -> int | str:
    if isinstance(term, int) and not isinstance(term, bool):
        return term
    if term not in ("sqrt", "exp"):
        raise ValueError(f"polynomial term {term!r}")
    return str(term)


def _size(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else np.dtype(_FLOATS[dtype]).itemsize


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    """float64 [n, count] of their bytes uint8 [n, m]."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        high = raw.view("<u2").astype("<u4") << 16
        return high.view("<f4").astype(np.float64)
    return raw.view(_FLOATS[dtype]).astype(np.float64)


def unpacked(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int64 [n, count], numbers of so many bits, highest bit first, of bytes uint8 [n, m]. ValueError for too few."""
    if packed.shape[1] * 8 < bits * count:
        raise ValueError(f"expected {count} numbers of {bits} bits, got {packed.shape[1]} bytes")
    flat = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


class DistillKitRows:
    """Parquet files of one data set, in a folder, or one of them.

    config: the compression config; default compression_config.yaml beside the files. vocab_size: of the ids.

    ValueError without pyarrow, for files without the columns, and for a config that is missing or of another kind.
    """

    top_p: float | None = None
    precision = "as compressed"
    parallel, repeats = 1, False

    def __init__(self, rows: Path, config: Path | None = None):
        self._parquet = _library()
        files = sorted(rows.glob("*.parquet")) if rows.is_dir() else [rows]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"--rows {rows}: expected a parquet file, or a folder of them")
        self._files = [self._opened(file) for file in files]
        columns = set(self._files[0].schema_arrow.names)
        if {"packed_indices", "exact_values", "coeffs"} <= columns:
            raise ValueError(
                f"{files[0]}: DistillKit's first form holds logits less their mean, of which the probabilities are not "
                "known: sample it again with a version that compresses log-probabilities"
            )
        self._compression: Compression | None = None
        if columns >= {"input_ids", *_COMPRESSED}:
            beside = (rows if rows.is_dir() else rows.parent) / _CONFIG
            self._compression, self._columns = Compression.read(config or beside), _COMPRESSED
            self.k = self._compression.k
        elif columns >= {"input_ids", *_PLAIN}:
            self._columns = _PLAIN
            self.k = len(self._files[0].read_row_group(0, columns=["token_ids"])["token_ids"][0][0])
        else:
            raise ValueError(
                f"{files[0]}: expected columns input_ids and {' '.join(_COMPRESSED)}, or {' '.join(_PLAIN)}, got "
                f"{' '.join(sorted(columns))}"
            )
        self.name = f"DistillKit rows of {rows.resolve().name}"
        described = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        self.made_from = hashlib.sha256(json.dumps([described, repr(self._compression)]).encode()).hexdigest()
        # (length, CRC-32 of the ids) of each sequence -> where it lies: file, row group, row, first token.
        self._places: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self._lengths: set[int] = set()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        for number, file in enumerate(self._files):
            for group in range(file.num_row_groups):
                self._index(number, group, "attention_mask" in columns)

    def _opened(self, path: Path) -> Any:
        try:
            return self._parquet.ParquetFile(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: expected a parquet file: {error}") from error

    def _index(self, number: int, group: int, is_packed: bool) -> None:
        names = ["input_ids", "attention_mask"] if is_packed else ["input_ids"]
        table = self._files[number].read_row_group(group, columns=names)
        for row in range(len(table)):
            ids = np.array(table["input_ids"][row].as_py(), dtype=np.int64)
            begin = np.zeros(1, dtype=np.int64)
            if is_packed:
                mask = np.array(table["attention_mask"][row].as_py(), dtype=np.int64)
                begin = np.flatnonzero(np.diff(mask, prepend=0))
                ids = ids[: len(mask) - int(np.argmax(mask[::-1] != 0)) if mask.any() else 0]
            for first, end in zip(begin, [*begin[1:], len(ids)], strict=True):
                sequence = ids[first:end].astype("<u4")
                if len(sequence):
                    self._lengths.add(len(sequence))
                    self._places.setdefault(
                        (len(sequence), zlib.crc32(sequence.tobytes())), (number, group, row, int(first))
                    )

    def entries(self, index: int, sample: EncodedSample) -> SampleEntries:
        rows = predicted_from(sample)
        number, group, row, first = self._find(index, sample, int(rows[-1]) + 1)
        table = self._group(number, group)
        cells = {name: self._cells(table[name][row], rows + first) for name in self._columns}
        if self._compression is not None:
            ids = self._compression.ids(cells["bytepacked_indices"])
            return entries_of(index, sample, ids, self._compression.log_p(cells["compressed_logprobs"]))
        return entries_of(index, sample, cells["token_ids"], cells["top_values"])

    def _find(self, index: int, sample: EncodedSample, needed: int) -> tuple[int, int, int, int]:
        """The sequence that begins as the sample does, over at least so many tokens."""
        digest, ids = 0, sample.input_ids.astype("<u4")
        found = None
        for length in range(1, min(len(ids), _LENGTHS_AT_MOST) + 1):
            digest = zlib.crc32(ids[length - 1 : length].tobytes(), digest)
            if length >= needed and length in self._lengths and (length, digest) in self._places:
                found = self._places[length, digest]
        if found is None:
            raise ValueError(
                f"record {index}: no row has its first {needed} tokens: the rows are of other data, or of another "
                "tokenizer or chat template"
            )
        return found

    def _group(self, number: int, group: int) -> Any:
        key = (number, group)
        if key not in self._groups:
            self._groups[key] = self._files[number].read_row_group(group, columns=list(self._columns))
            if len(self._groups) > _KEPT:
                self._groups.popitem(last=False)
        return self._groups[key]

    def _cells(self, cell: Any, places: np.ndarray) -> np.ndarray:
        values = cell.values
        if places[-1] >= len(values):
            raise ValueError(f"a row has {len(values)} places, and one of {places[-1] + 1} is asked for")
        return np.array([values[place].as_py() for place in places.tolist()], dtype=_dtype_of(values))


def _dtype_of(values: Any) -> Any:
    """uint8 of bytes, else float64."""
    return np.uint8 if str(values.type.value_type) == "uint8" else np.float64


def _library() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("DistillKit's rows are parquet files: pip install 'qtarget_megatron[data]'") from error
    return pyarrow.parquet
