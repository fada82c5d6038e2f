"""Reading a cache by sample index."""

from __future__ import annotations

import bisect
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from qtarget_megatron.data import compare_tokenizers
from qtarget_megatron.teacher_cache.header import last_context_digest, tokenizer_digest
from qtarget_megatron.teacher_cache.index import PROGRAM, VOCABULARY_FILE, read_index
from qtarget_megatron.teacher_cache.parts import RESTORE, PartContents, decoded, mapped, scan

# Parts that are kept mapped: each holds a file descriptor.
_MAPPED_PARTS = 128


class TeacherCache:
    """A complete cache, by sample index. Parts are mapped when they are first read.

    Opening checks that all files are there and have their sizes. Reading a sample checks that its bytes are those that
    were written, and that they are probabilities (parts.check_values); verify() does so for all: ValueError, one line,
    where they are not. Can be pickled: each process maps the files by itself.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = Path(directory)
        index = read_index(self.directory)
        self.header, self._parts = index.header, index.parts
        if not index.complete:
            done = sum(part.samples for part in scan(self.directory, self.header))
            raise ValueError(
                f"teacher cache {self.directory} is incomplete, with {done} of {self.header.num_samples} samples: run "
                f"{PROGRAM} again with the same inputs to complete it"
            )
        for part in self._parts:
            path = self.directory / part.file
            if not path.is_file():
                raise ValueError(f"{path} is missing{RESTORE}")
            if (size := path.stat().st_size) != part.bytes:
                raise ValueError(f"{path} has {size} bytes, expected {part.bytes}{RESTORE}")
        self._firsts = [part.first for part in self._parts]
        self._mapped: dict[int, PartContents] = {}

    def __len__(self) -> int:
        """Number of samples."""
        return self.header.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_mapped": {}}

    @property
    def num_tokens(self) -> int:
        return sum(part.tokens for part in self._parts)

    @property
    def num_entries(self) -> int:
        return sum(part.entries for part in self._parts)

    @property
    def num_bytes(self) -> int:
        """Bytes of the parts' files."""
        return sum(part.bytes for part in self._parts)

    @property
    def mean_tail(self) -> float:
        """Mean over the tokens of the mass that is not kept; 0 without tokens."""
        return sum(part.tail for part in self._parts) / max(self.num_tokens, 1)

    def check(
        self,
        *,
        data_digest: str | None = None,
        tokenizer: Any = None,
        seq_length: int | None = None,
        vocab_size: int | None = None,
        date: str | None = None,
    ) -> None:
        """ValueError, with the reason, unless the cache serves a training with these; None: not compared.

        data_digest: resumable.file_digest of the training file.
        tokenizer:   the student's, whose ids must stand for the teacher's tokens.
        seq_length:  at most the cache's; a shorter one leaves the first supervised tokens as they are.
        vocab_size:  of the student, above every id that is kept (models may pad one vocabulary to different sizes).
        date:        YYYY-MM-DD, that the chat template is to write.
        """
        header, where = self.header, f"teacher cache {self.directory}"
        if data_digest is not None and data_digest != header.data:
            raise ValueError(
                f"{where} was made from other data (SHA-256 {header.data[:12]}..., not {data_digest[:12]}...): run "
                f"{PROGRAM} on the training file"
            )
        if tokenizer is not None and tokenizer_digest(tokenizer) != header.tokenizer:
            try:
                compare_tokenizers(tokenizer, self)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
            raise ValueError(f"{self.directory / VOCABULARY_FILE} was changed{RESTORE}")
        if seq_length is not None and seq_length > header.seq_length:
            raise ValueError(
                f"{where} was made with --seq-length {header.seq_length}, training has {seq_length}: write the cache "
                f"with {seq_length}, or train with at most {header.seq_length}"
            )
        if date is not None and header.date not in (None, date):
            raise ValueError(
                f"{where} was made with --data-date {header.date}, training has {date}: drop the flag, which takes the "
                "cache's, or write the cache with it"
            )
        largest = max((part.max_id for part in self._parts), default=-1)
        if vocab_size is not None and vocab_size <= largest:
            raise ValueError(
                f"{where} has token ids up to {largest}, the student a vocabulary of {vocab_size}: write the cache "
                "with --student-hf STUDENT_DIR (qtarget cache-teacher) where the two share their "
                "tokens and pad them to different sizes; else use a teacher that shares them"
            )

    @property
    def num_parts(self) -> int:
        return len(self._parts)

    def verify(self, parts: Iterable[int]) -> None:
        """Read all samples of these parts, 0 to num_parts - 1.

        ValueError for the first that is not what was written, or that no teacher can have said.
        """
        for number in parts:
            contents, _ = self._locate(self._firsts[number])
            for row in range(self._parts[number].samples):
                contents.sample(row, self.header)

    def get_vocab(self) -> dict[str, int]:
        """Token -> id of the teacher's tokenizer. ValueError where vocabulary.json is missing or damaged."""
        path = self.directory / VOCABULARY_FILE
        try:
            return {token: index for index, token in json.loads(path.read_bytes())}
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path} is missing or damaged{RESTORE}") from error

    def sample(
        self, index: int, input_ids: np.ndarray | None = None, supervised: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """ids int64 [n, k], log_p float32 [n, k] in nats and tail float32 [n] of a sample's n supervised tokens.

        A row holds the most likely tokens, first ones first; entries that top-p left out have id -1 and log_p -inf.
        input_ids, supervised: the sample as training reads it (data.EncodedSample), perhaps cut shorter; n is then the
        number of its supervised tokens, and ValueError where the teacher read anything else up to the last of them.
        """
        contents, row = self._locate(index)
        arrays = contents.sample(row, self.header)
        n = len(arrays["tail"])
        if input_ids is not None and supervised is not None:
            self._check_context(index, arrays["context"], input_ids, supervised)
            n = int(np.count_nonzero(supervised))
        return decoded(self.header, arrays, n)

    def check_sample(self, index: int, input_ids: np.ndarray, supervised: np.ndarray) -> None:
        """ValueError where sample() with these would say that the teacher read anything else; reads no entries."""
        contents, row = self._locate(index)
        self._check_context(index, contents.context(row), input_ids, supervised)

    def _check_context(self, index: int, context: np.ndarray, input_ids: np.ndarray, supervised: np.ndarray) -> None:
        where, n = f"teacher cache {self.directory}, sample {index}", int(np.count_nonzero(supervised))
        if n > len(context):
            raise ValueError(
                f"{where}: {len(context)} supervised tokens, training has {n}: write the cache with the same data, "
                "tokenizer, chat template and --seq-length"
            )
        if n and context[n - 1] != last_context_digest(input_ids, supervised):
            raise ValueError(
                f"{where}: the teacher read other tokens than training does, or others are supervised: write the cache "
                "with the same data, tokenizer and chat template"
            )

    def _locate(self, index: int) -> tuple[PartContents, int]:
        """The part that holds a sample, checked when it is mapped, and the sample's number in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in teacher cache {self.directory}")
        number = bisect.bisect_right(self._firsts, index) - 1
        part = self._parts[number]
        contents = self._mapped.pop(number, None)
        if contents is None:
            contents = mapped(self.directory / part.file)
            contents.check(self.header)
            if contents.part != part:
                raise ValueError(f"{self.directory / part.file} is corrupt, or of another cache{RESTORE}")
            if len(self._mapped) >= _MAPPED_PARTS:
                del self._mapped[next(iter(self._mapped))]
        # Last in order: the part that was used longest ago goes first.
        self._mapped[number] = contents
        return contents, index - part.first
