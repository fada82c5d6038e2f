"""Writing a cache, sample after sample, through interruptions."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from qtarget_megatron import output_lock
from qtarget_megatron.teacher_cache.header import CacheHeader, vocabulary_bytes
from qtarget_megatron.teacher_cache.index import INDEX_FILE, VOCABULARY_FILE, Index, read_index
from qtarget_megatron.teacher_cache.parts import (
    PATTERN,
    Arrays,
    Part,
    SampleEntries,
    decoded,
    encoded,
    mapped,
    packed,
    scan,
)
from qtarget_megatron.teacher_cache.reader import TeacherCache

LOCK_FILE = ".lock"
_PART_SAMPLES, _PART_BYTES = 512, 32 << 20


class CacheWriter:
    """Writes the samples of a cache in order.

    A part appears only as a whole, and cache.json says that the cache is complete only when it is. A later run with
    the same header goes on behind the last part.
    """

    def __init__(self, directory: Path, header: CacheHeader, tokenizer: Any):
        self.directory, self.header = Path(directory), header
        self._lock = self.directory / LOCK_FILE
        self._vocabulary = vocabulary_bytes(tokenizer)
        self._parts: list[Part] = []
        self._next = 0
        self._buffer: list[Arrays] = []
        self._buffered = 0

    def check(self) -> bool:
        """True where this very cache is there already, complete. Writes nothing.

        ValueError where the directory is no place for the cache: it holds something else, a cache of other inputs, or
        a complete one with files missing.
        """
        if not os.path.exists(self.directory):
            if not self.directory.parent.is_dir():
                raise ValueError(f"{self.directory}: there is no directory {self.directory.parent}: create it")
            return False
        if not self.directory.is_dir():
            raise ValueError(f"{self.directory} is a file: expected a directory to write, new or empty")
        if not (self.directory / INDEX_FILE).exists():
            # What open() writes before the index.
            begun = {VOCABULARY_FILE, f"{VOCABULARY_FILE}.new", f"{INDEX_FILE}.new", LOCK_FILE}
            if foreign := sorted({entry.name for entry in self.directory.iterdir()} - begun):
                raise ValueError(
                    f"{self.directory} holds {foreign[0]!r} and no teacher cache: expected a directory that is new or "
                    "empty"
                )
            return False
        index = read_index(self.directory)
        if differing := self.header.differing(index.header):
            raise ValueError(
                f"{self.directory} holds a cache with a different {', '.join(differing)}: choose another directory, or "
                "delete it to start over"
            )
        if index.complete:
            TeacherCache(self.directory)
        return index.complete

    def reserve(self) -> None:
        """Keep other processes from writing it until finish() or the end of this one. Call after check().

        ValueError where another process writes it, or the directory cannot be written to.
        """
        output_lock.claim(self._lock, str(self.directory))

    def open(self) -> int:
        """How many samples are there already. Call after check()."""
        self.reserve()
        try:
            self.directory.mkdir(exist_ok=True)
            if not (self.directory / INDEX_FILE).exists():
                _write(self.directory / VOCABULARY_FILE, self._vocabulary)
                _write(self.directory / INDEX_FILE, Index(self.header, False, []).to_json())
            self._parts = scan(self.directory, self.header)
            kept = {part.file for part in self._parts}
            # What was not written to its end, or lies behind a part that is missing.
            for path in (*self.directory.glob(PATTERN), *self.directory.glob("*.new")):
                if path.name not in kept:
                    path.unlink()
        except OSError as error:
            raise _failed(self.directory, error) from error
        self._next = sum(part.samples for part in self._parts)
        return self._next

    def append(self, samples: Iterable[SampleEntries | None]) -> None:
        """The next samples; None: one without supervised tokens. They are on disk when their part is full.

        ValueError for one with values that are no teacher's; it is not written, nor are those behind it.
        """
        for sample in samples:
            try:
                self._buffer.append(encoded(self.header, sample))
            except ValueError as error:
                index = self._next + len(self._buffer)
                raise ValueError(f"{self.directory}: sample {index} holds {error}; it is not written") from None
            self._buffered += sum(array.nbytes for array in self._buffer[-1].values())
            if len(self._buffer) == _PART_SAMPLES or self._buffered >= _PART_BYTES:
                self._write_part()

    def sample(self, index: int) -> SampleEntries:
        """What an earlier append() has kept of a sample."""
        if index >= self._next:
            arrays = self._buffer[index - self._next]
        else:
            part = next(part for part in self._parts if part.first <= index < part.first + part.samples)
            arrays = mapped(self.directory / part.file).sample(index - part.first, self.header)
        ids, log_p, tail = decoded(self.header, arrays, len(arrays["tail"]))
        return SampleEntries(ids, log_p, (ids >= 0).sum(1), tail, arrays["context"])

    def finish(self) -> None:
        """All samples have come: the cache is complete."""
        if self._buffer:
            self._write_part()
        assert self._next == self.header.num_samples, (self._next, self.header.num_samples)
        try:
            _write(self.directory / INDEX_FILE, Index(self.header, True, self._parts).to_json())
        except OSError as error:
            raise _failed(self.directory, error) from error
        output_lock.release(self._lock)

    def _write_part(self) -> None:
        part, data = packed(self.header, self._next, self._buffer)
        try:
            _write(self.directory / part.file, data)
        except OSError as error:
            raise _failed(self.directory, error) from error
        self._parts.append(part)
        self._next += part.samples
        self._buffer, self._buffered = [], 0


def _write(path: Path, data: bytes) -> None:
    """Write a file that appears only as a whole, and outlives a loss of power."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _failed(directory: Path, error: OSError) -> ValueError:
    return ValueError(f"{directory}: {error.strerror}; run again to go on from here")
