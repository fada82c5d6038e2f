"""What a cache was made from, and digests of what must not differ where it is used."""

from __future__ import annotations

import datetime
import hashlib
import json
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

DTYPES = ("float16", "float32")
_MAX_VOCAB_SIZE = 1 << 24
_MAX_ENTRIES = (1 << 16) - 1
# The fields that the entries depend on, by the name that the user knows them by.
_MADE_FROM = {
    "data": "--data",
    "num_samples": "number of samples",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "teacher_files": "teacher",
    "teacher_checkpoint": "--load",
    "precision": "precision (--bf16, --fp16)",
    "vocab_size": "vocabulary size",
    "seq_length": "--seq-length",
    "k": "--k",
    "top_p": "--top-p",
    "dtype": "--dtype",
    "date": "--data-date",
}


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """What a cache was made from.

    data: Records.digest of the data, which have num_samples records.
    tokenizer, chat_template: digests of them.
    teacher: its name.
    teacher_files: digest of the names, sizes and times of its files.
    teacher_checkpoint: the same of the Megatron checkpoint with its weights, if any.
    precision: of the teacher.
    vocab_size: of its softmax.
    seq_length: samples are cut to.
    date: YYYY-MM-DD, that the chat template wrote; None where it asks for none, and in caches older than this field.
    k: entries kept of each token, fewer where these reach the mass top_p.
    dtype: of the log-probabilities.

    ValueError for a k, top_p, dtype or vocab_size that a cache cannot have.
    """

    data: str
    num_samples: int
    tokenizer: str
    chat_template: str
    teacher: str
    teacher_files: str
    teacher_checkpoint: str | None = None
    precision: str
    vocab_size: int
    seq_length: int
    k: int
    top_p: float | None = None
    dtype: str = "float16"
    date: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.vocab_size <= _MAX_VOCAB_SIZE:
            raise ValueError(f"vocabulary size: expected 1 to {_MAX_VOCAB_SIZE}, got {self.vocab_size}")
        limit = min(self.vocab_size, _MAX_ENTRIES)
        if not 0 < self.k <= limit:
            raise ValueError(f"--k: expected 1 to {limit} entries per token, got {self.k}")
        if self.top_p is not None and not 0 < self.top_p < 1:
            raise ValueError(
                f"--top-p: expected a mass above 0 and below 1, got {self.top_p}: drop it to keep k always"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"--dtype: expected {' or '.join(DTYPES)}, got {self.dtype!r}")
        if self.date is not None:
            datetime.date.fromisoformat(self.date)

    @property
    def identity(self) -> str:
        """Parts carry it, so that those of another cache are noticed."""
        known = {name: getattr(self, name) for name in _MADE_FROM}
        if self.date is None:  # as in caches that are older than this field
            del known["date"]
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def entry_dtypes(self) -> dict[str, np.dtype]:
        """Names and dtypes of the tensors that hold something for each kept entry."""
        high = {"ids_high": np.dtype("u1")} if self.vocab_size > 1 << 16 else {}
        return {"ids": np.dtype("<u2"), **high, "log_p": np.dtype("<f2" if self.dtype == "float16" else "<f4")}

    @property
    def token_dtypes(self) -> dict[str, np.dtype]:
        """Names and dtypes of the tensors that hold something for each token."""
        dtypes: dict[str, np.dtype] = {"tail": np.dtype("<f4"), "context": np.dtype("<u4")}
        if self.dtype == "float16":
            dtypes["top_log_p"] = np.dtype("<f4")
        if self.top_p is not None:
            dtypes["counts"] = np.dtype("<u2")
        return dtypes

    @property
    def bytes_per_token(self) -> int:
        """With top-p at most."""
        return self._bytes(self.k)

    @property
    def least_bytes_per_token(self) -> int:
        """With top-p those of one entry."""
        return self._bytes(self.k if self.top_p is None else 1)

    def _bytes(self, entries: int) -> int:
        entry, token = (
            sum(dtype.itemsize for dtype in dtypes.values()) for dtypes in (self.entry_dtypes, self.token_dtypes)
        )
        return entries * entry + token

    def differing(self, other: CacheHeader) -> list[str]:
        """Names of what the two were made from differently."""
        return [shown for name, shown in _MADE_FROM.items() if getattr(self, name) != getattr(other, name)]


def context_digests(input_ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    """For each supervised token the CRC-32 of all tokens up to it, uint32 [n].

    input_ids: int [m]; supervised: bool [m], as in data.EncodedSample. Of the little-endian uint32 numbers
    2 id + supervised: the same digest means the same ids and supervision up to there. Another chat template, tokenizer
    or mask is noticed, and a sample that is merely cut shorter has the same digests.
    """
    words = _words(input_ids, supervised)
    digests, digest, begin = [], 0, 0
    for end in (np.flatnonzero(supervised) + 1).tolist():
        digest = zlib.crc32(words[begin:end], digest)
        digests.append(digest)
        begin = end
    return np.array(digests, dtype=np.uint32)


def last_context_digest(input_ids: np.ndarray, supervised: np.ndarray) -> int:
    """The last of context_digests, which there must be."""
    return zlib.crc32(_words(input_ids, supervised)[: int(np.flatnonzero(supervised)[-1]) + 1])


def _words(input_ids: np.ndarray, supervised: np.ndarray) -> np.ndarray:
    words: np.ndarray = np.asarray(input_ids, dtype=np.int64) * 2 + supervised
    return words.astype("<u4")


def tokenizer_digest(tokenizer: Any) -> str:
    """SHA-256 of vocabulary_bytes."""
    return hashlib.sha256(vocabulary_bytes(tokenizer)).hexdigest()


def template_digest(tokenizer: Any) -> str:
    """SHA-256 of a tokenizer's chat template, or of its having none."""
    return hashlib.sha256(json.dumps(tokenizer.chat_template).encode()).hexdigest()


def vocabulary_bytes(tokenizer: Any) -> bytes:
    """JSON of the [id, token] of a tokenizer's get_vocab(), by id."""
    tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return json.dumps(tokens, separators=(",", ":")).encode()
