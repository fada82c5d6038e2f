"""A part of a cache: some samples in one safetensors file, laid out as the package's docstring says."""

from __future__ import annotations

import json
import math
import mmap
import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from qtarget_megatron.teacher_cache.header import CacheHeader

PATTERN = "samples-*.safetensors"
RESTORE = ": restore it from a copy, or delete the cache and write it again"
_TABLES = ("crc32", "entry_offsets", "token_offsets")
# A safetensors header of ours takes one or two thousand.
_LONGEST_HEAD = 1 << 20
# A log-probability's, and the tail's: rounding of whoever computed it.
_SLACK = 1e-3
# How far a token's probabilities may add up to something else than 1. float16 rounds log p - top_log_p by 2^-11 of
# itself, hence the sum by less than 2^-11 of the entropy, which is below ln 2^24 = 17.
_SUM_SLACK = {"float16": 1e-2, "float32": 1e-3}

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class SampleEntries:
    """What is kept of a sample of n supervised tokens.

    ids:     int [n, k], the most likely tokens, first ones first.
    log_p:   float32 [n, k], in nats.
    counts:  int [n], how many of these are kept; all k without top-p.
    tail:    [n], mass of the tokens that are not kept.
    context: uint32 [n], by context_digests.
    """

    ids: np.ndarray
    log_p: np.ndarray
    counts: np.ndarray
    tail: np.ndarray
    context: np.ndarray


@dataclass(frozen=True)
class Part:
    """A part as the index describes it.

    head_crc32: of its safetensors header and its tables.
    tail:       sum over its tokens.
    max_id:     -1 without entries.
    """

    file: str
    first: int
    samples: int
    tokens: int
    entries: int
    bytes: int
    head_crc32: int
    tail: float
    max_id: int


def part_name(first: int) -> str:
    """File name of the part that begins with this sample."""
    return f"samples-{first:010d}.safetensors"


def encoded(header: CacheHeader, sample: SampleEntries | None) -> Arrays:
    """A sample's arrays as they are stored; None: no supervised tokens."""
    if sample is None:
        none = np.empty((0, header.k))
        sample = SampleEntries(none, none, none[:, 0], none[:, 0], none[:, 0])
    ids, values = sample.ids.astype(np.int64), {"tail": sample.tail, "context": sample.context}
    assert ids.shape == sample.log_p.shape and ids.shape[1] == header.k, (ids.shape, sample.log_p.shape)
    if ids.size and not 0 <= ids.min() <= ids.max() < header.vocab_size:
        raise ValueError(f"expected token ids from 0 to {header.vocab_size - 1}, got {ids.min()} to {ids.max()}")
    values |= {"ids": ids & 0xFFFF, "ids_high": ids >> 16, "log_p": sample.log_p}
    if header.dtype == "float16":
        values["top_log_p"] = sample.log_p[:, 0]
        values["log_p"] = sample.log_p - sample.log_p[:, :1]
    if header.top_p is not None:
        kept = np.arange(header.k) < sample.counts[:, None]
        values |= {"counts": sample.counts, **{name: values[name][kept] for name in header.entry_dtypes}}
    # What float16 makes -inf, below -65504, has probability 0 either way.
    with np.errstate(over="ignore"):
        arrays = {name: values[name].astype(d) for name, d in (header.entry_dtypes | header.token_dtypes).items()}
    check_values(header, arrays, header.vocab_size - 1)
    return arrays


def check_values(header: CacheHeader, arrays: Arrays, largest_id: int) -> None:
    """ValueError, with the reason, unless stored arrays of some tokens hold what a teacher's probabilities can be.

    Each token's ids are different and at most largest_id, its log-probabilities and its tail are of probabilities, and
    all of these add up to 1.
    """
    tail, ids = arrays["tail"], whole_ids(arrays)
    if len(tail) == 0:
        return
    if header.top_p is None:
        counts = np.full(len(tail), header.k)
    else:
        counts = arrays["counts"].astype(np.int64)
        if counts.min() < 1 or counts.max() > header.k or counts.sum() != ids.size:
            raise ValueError(f"numbers of kept entries from {counts.min()} to {counts.max()}, for {ids.size} entries")
    starts = np.cumsum(counts) - counts
    if ids.max() > largest_id:
        raise ValueError(f"token id {ids.max()}, expected at most {largest_id}")
    # A row for each token; what is not kept is different from all else.
    rows = np.tile(-1 - np.arange(header.k, dtype=np.int32), (len(tail), 1))
    rows[np.arange(header.k) < counts[:, None]] = ids.ravel()
    rows.sort(axis=1)
    if (rows[:, 1:] == rows[:, :-1]).any():
        raise ValueError("a token id twice among the entries of one token")
    log_p = arrays["log_p"].ravel().astype(np.float32)
    top = arrays["top_log_p"] if "top_log_p" in arrays else np.zeros_like(tail)
    # Comparisons that a NaN fails.
    if not (log_p <= _SLACK).all() or not ((top > -np.inf) & (top <= _SLACK)).all():
        raise ValueError("a log-probability above 0, or that is no number")
    if not ((tail >= 0) & (tail <= 1 + _SLACK)).all():
        raise ValueError("a tail below 0, above 1, or that is no number")
    total = np.add.reduceat(np.exp(log_p), starts) * np.exp(top) + tail
    if (wrong := np.abs(total - 1) > _SUM_SLACK[header.dtype]).any():
        raise ValueError(f"probabilities of a token that add up to {total[wrong][0]:.6g}, expected 1")


def packed(header: CacheHeader, first: int, samples: list[Arrays]) -> tuple[Part, bytes]:
    """Encoded samples, first the index of the first, as a part and the bytes of its file."""

    def offsets(name: str) -> np.ndarray:
        return np.cumsum([0, *(sample[name].size for sample in samples)]).astype("<i8")

    tensors = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    tables = {"token_offsets": offsets("tail"), "crc32": np.array([_crc32(sample) for sample in samples], dtype="<u4")}
    if header.top_p is not None:
        tables["entry_offsets"] = offsets("ids")
    known = {
        "first": first,
        "samples": len(samples),
        "tail": float(tensors["tail"].sum(dtype=np.float64)),
        "max_id": int(whole_ids(tensors).max(initial=-1)),
    }
    # One entry: safetensors writes several in any order, and the same samples shall make the same file.
    data = save(tensors | tables, {"part": json.dumps({"cache": header.identity, **known})})
    return PartContents(Path(part_name(first)), data).part, data


def whole_ids(arrays: Arrays) -> np.ndarray:
    """int64 ids from their stored halves."""
    ids = arrays["ids"].astype(np.int64)
    return ids | arrays["ids_high"].astype(np.int64) << 16 if "ids_high" in arrays else ids


def decoded(header: CacheHeader, arrays: Arrays, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids int64 [n, k], log_p float32 [n, k] and tail float32 [n] of the first n tokens of a sample's stored arrays;
    entries that top-p left out have id -1 and log_p -inf."""
    cut = {name: array[:count] for name, array in arrays.items()}
    if header.top_p is None:
        ids, log_p = whole_ids(cut), cut["log_p"].astype(np.float32)
    else:
        kept = np.arange(header.k) < cut["counts"][:, None]
        number = np.count_nonzero(kept)
        ids, log_p = np.full(kept.shape, -1), np.full(kept.shape, -np.inf, dtype=np.float32)
        ids[kept], log_p[kept] = whole_ids(arrays)[:number], arrays["log_p"][:number]
    if "top_log_p" in cut:
        log_p += cut["top_log_p"][:, None]
    return ids, log_p, cut["tail"].copy()


def _crc32(arrays: Arrays, digest: int = 0) -> int:
    for name in sorted(arrays):
        digest = zlib.crc32(arrays[name], digest)
    return digest


class PartContents:
    """A part's tensors as views of its bytes. ValueError, one line, where these are no part."""

    def __init__(self, path: Path, data: bytes | mmap.mmap):
        self._path = path
        try:
            start = 8 + int.from_bytes(data[:8], "little")
            if start > _LONGEST_HEAD:
                raise ValueError("header")
            head = data[8:start]
            described = json.loads(head)
            known = json.loads(described.pop("__metadata__")["part"])
            self.tensors = {name: _view(data, start, **tensor) for name, tensor in described.items()}
            if len(data) != start + max(tensor["data_offsets"][1] for tensor in described.values()):
                raise ValueError("size")
            self._cache = known.pop("cache")
            tables = {name: self.tensors[name] for name in _TABLES if name in self.tensors}
            self.part = Part(
                file=path.name,
                tokens=len(self.tensors["tail"]),
                entries=self.tensors["ids"].size,
                bytes=len(data),
                head_crc32=_crc32(tables, zlib.crc32(head)),
                **known,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
            raise ValueError(f"{path} is truncated, corrupt or no part of a teacher cache{RESTORE}") from None

    def check(self, header: CacheHeader) -> None:
        """ValueError unless the part belongs to the cache and has the tensors that this asks for."""
        if self._cache != header.identity:
            raise ValueError(f"{self._path} is not of this cache, or cache.json was changed{RESTORE}")
        part, ragged = self.part, header.top_p is not None
        shape = (part.entries,) if ragged else (part.tokens, header.k)
        offsets = (np.dtype("<i8"), (part.samples + 1,))
        expected = {name: (dtype, shape) for name, dtype in header.entry_dtypes.items()}
        expected |= {name: (dtype, (part.tokens,)) for name, dtype in header.token_dtypes.items()}
        expected |= {"token_offsets": offsets, "crc32": (np.dtype("<u4"), (part.samples,))}
        expected |= {"entry_offsets": offsets} if ragged else {}
        if expected != {name: (array.dtype, array.shape) for name, array in self.tensors.items()}:
            raise ValueError(f"{self._path} does not have the tensors that cache.json asks for{RESTORE}")
        ends = {"token_offsets": part.tokens} | ({"entry_offsets": part.entries} if ragged else {})
        for name, end in ends.items():
            table = self.tensors[name]
            if table[0] != 0 or table[-1] != end or (table[1:] < table[:-1]).any():
                raise ValueError(f"{self._path} has {name} that do not go up from 0 to {end}{RESTORE}")

    def sample(self, row: int, header: CacheHeader) -> Arrays:
        """The stored arrays of one sample. ValueError where they are not what was written."""
        begin, end = self.tensors["token_offsets"][row : row + 2].tolist()
        arrays = {name: self.tensors[name][begin:end] for name in header.token_dtypes}
        if header.top_p is not None:
            begin, end = self.tensors["entry_offsets"][row : row + 2].tolist()
        arrays |= {name: self.tensors[name][begin:end] for name in header.entry_dtypes}
        if _crc32(arrays) != self.tensors["crc32"][row]:
            raise ValueError(f"{self._path} is corrupt at sample {self.part.first + row}{RESTORE}")
        try:
            check_values(header, arrays, self.part.max_id)
        except ValueError as error:
            raise ValueError(f"{self._path} holds {error} (sample {self.part.first + row}){RESTORE}") from None
        return arrays

    def context(self, row: int) -> np.ndarray:
        """The context digests of one sample."""
        begin, end = self.tensors["token_offsets"][row : row + 2].tolist()
        return self.tensors["context"][begin:end]


def _view(data: bytes | mmap.mmap, start: int, *, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    kind = np.dtype(f"<{dtype[0].lower()}{int(dtype[1:]) // 8}")
    begin, end = data_offsets
    if begin < 0 or end - begin != kind.itemsize * math.prod(shape):
        raise ValueError("offsets")
    return np.ndarray(shape, kind, data, start + begin)


def mapped(path: Path) -> PartContents:
    """A part's file, mapped."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}{RESTORE}") from error
    return PartContents(path, data)


def scan(directory: Path, header: CacheHeader) -> list[Part]:
    """The parts of an incomplete cache, up to the first that is missing."""
    parts, following = [], 0
    while (path := directory / part_name(following)).exists():
        contents = mapped(path)
        contents.check(header)
        if contents.part.first != following or contents.part.samples < 1:
            raise ValueError(f"{path} does not begin with sample {following}{RESTORE}")
        parts.append(contents.part)
        following += contents.part.samples
    return parts
