"""Records of a JSON lines file, by index."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import struct
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np

from qtarget_megatron.cache_folder import cache_folder, keep, load_kept
from qtarget_megatron.data.forms import AUTO, form_of, record_at
from qtarget_megatron.data.messages import expect
from qtarget_megatron.resumable import file_digest

# Bytes of a file from which on reading it takes seconds.
_KEPT_FROM = 1 << 26
# Where a record stands in its file; lines count from 1.
PLACE = np.dtype([("start", "<i8"), ("length", "<u4"), ("line", "<u4")])
_PLACE = struct.Struct("<qII")
_PANDAS = (
    "convert it: python -c \"import pandas as p; p.{}('FILE').to_json('data.jsonl', orient='records', lines=True)\""
)
_DATASETS = "convert it: python -c \"import datasets as d; d.Dataset.from_file('FILE').to_json('data.jsonl')\""
# First bytes -> what the file is, and what makes JSON lines of it.
_BINARY = {
    b"\x1f\x8b": ("gzip", "unpack it: gunzip -k FILE"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unpack it: zstd -d FILE"),
    b"BZh": ("bzip2", "unpack it: bunzip2 -k FILE"),
    b"\xfd7zXZ\x00": ("xz", "unpack it: xz -dk FILE"),
    b"PK\x03\x04": ("a zip archive", "unpack it: unzip FILE"),
    b"PAR1": ("parquet", _PANDAS.format("read_parquet")),
    b"ARROW1": ("arrow", _PANDAS.format("read_feather")),
    b"\xff\xff\xff\xff": ("an arrow stream", _DATASETS),
    b"\xff\xfe\x00\x00": ("UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8 FILE > data.jsonl"),
    b"\xff\xfe": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 FILE > data.jsonl"),
    b"\xfe\xff": ("UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 FILE > data.jsonl"),
    b"SQLite format 3": ("an SQLite database", "export its rows as JSON lines"),
}  # fmt: skip
_LINES = "jq -c '.[]' FILE > data.jsonl"


def binary_kind(head: bytes) -> tuple[str, str] | None:
    """What the first 16 bytes of a file say that it is, and how JSON lines are made of it; None for text."""
    return next((known for magic, known in _BINARY.items() if head.startswith(magic)), None)


class JsonlFile:
    """Random access to the records of a JSON lines file (UTF-8); blank lines are ignored.

    Keeps 16 bytes per record (start, length, line number) and never the text; forked and spawned
    worker processes may read it. Records count from 0, the lines in error messages from 1.

    form: one of forms.FORMS, that of every record; auto: that of the first one.

    Raises ValueError, when it is opened, for a file of another format, or one whose first record has
    no form or another; and when it is read, once its contents have changed. That is looked for
    at each record, by size and time. A file may be empty.
    """

    def __init__(
        self, path: str | os.PathLike[str], form: str = AUTO, *, unpacked: str | os.PathLike[str] | None = None
    ):
        """unpacked: the file that is read, where the one of this path is compressed."""
        self.path, self.form = str(path), form
        self._file = str(unpacked or path)
        self._handle: FileIO | None = None
        try:
            with open(self._file, "rb") as file:
                self._state = file_state(file.fileno())
                self._check_format(file.read(16))
            try:
                self._index, self.digest = self._read_index()
            except ValueError as error:
                raise ValueError(f"data file {self.path!r}, {error}") from None
        except OSError as error:
            raise ValueError(f"data file {self._file!r}: {error.strerror}") from error
        if len(self._index):
            self._check_first()

    def _read_index(self) -> tuple[np.ndarray, str]:
        return _indexed(os.path.abspath(self._file), self._state)

    def _check_format(self, head: bytes) -> None:
        if (found := binary_kind(head)) is not None:
            kind, advice = found[0], found[1].replace("FILE", self._file)
            raise ValueError(f"data file {self.path!r} is {kind}, expected JSON lines in UTF-8: {advice}")
        if b"\x00" in head and head.strip(b"\x00"):
            raise ValueError(
                f"data file {self.path!r} holds zero bytes, as UTF-16 or a binary format does, expected JSON lines in "
                "UTF-8: convert it"
            )

    def _check_first(self) -> None:
        try:
            self.record(0)
            self.form = form_of(self.raw(0)) if self.form == AUTO else self.form
        except ValueError as error:
            where, line = self.where(0), self.text(0).strip()
            if isinstance(error.__cause__, RecursionError):
                raise
            several = f"data file {where}: expected one record in each line, got"
            if line.startswith("[") and line.lstrip("[ {")[:1] in ('"', ""):
                advice = _LINES.replace("FILE", self._file)
                raise ValueError(f"{several} a JSON array: write its entries as lines: {advice}") from error
            if line.startswith("{") and not line.endswith("}") and _is_spread(line):
                advice = f"jq -c . {self._file} > data.jsonl"
                raise ValueError(f"{several} JSON spread over lines: write each record in one: {advice}") from error
            if not line.startswith(("{", "[", '"')) and ("," in line or "\t" in line):
                advice = _PANDAS.format("read_csv").replace("FILE", self._file)
                raise ValueError(f"{several} what looks like CSV ({line[:40]!r}): {advice}") from error
            raise

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_bytes(self) -> int:
        """Bytes of all records' lines; blank ones do not count."""
        return int(self._index["length"].sum(dtype=np.int64))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def where(self, index: int) -> str:
        """``path:line`` of a record, for messages."""
        return f"{self.path}:{self._line(index)}"

    def record(self, index: int) -> dict[str, Any]:
        """The record at ``index`` as forms.canonical gives it; ValueError with its line where it has another form."""
        return record_at(self, index, file=self._file)

    def raw(self, index: int) -> dict[str, Any]:
        """The record at ``index`` as it stands in the file, an object of any fields; otherwise ValueError."""
        text = self._written(index).rstrip(" \t\r\n")
        try:
            record: dict[str, Any] = json.loads(text)
            expect(dict, record, "record")
        except json.JSONDecodeError as error:
            where = f"{self.path}:{self._line(index) + error.lineno - 1}"
            raise ValueError(f"{where}: expected JSON, got {error.msg} at column {error.colno}") from error
        except RecursionError as error:
            raise ValueError(f"{self.where(index)}: expected a record, got JSON nested too deep to read") from error
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {error}") from error
        return record

    def text(self, index: int) -> str:
        """The line of a record as it stands in the file; ValueError where it is not UTF-8."""
        return self._written(index)

    def _line(self, index: int) -> int:
        return int(self._index["line"][index])

    def _written(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        if self._handle is None:
            try:
                self._handle = open(self._file, "rb", buffering=0)
            except OSError as error:
                raise ValueError(f"data file {self._file!r}: {error.strerror}") from error
        if (state := file_state(self._handle.fileno())) != self._state:
            self._check_contents(state)
        start, length, _ = self._index[index].item()
        # pread, not seek and read: forked workers share one file position.
        raw = os.pread(self._handle.fileno(), length, start)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: expected UTF-8, got {error.reason}") from error

    def _check_contents(self, state: tuple[int, ...]) -> None:
        try:
            check_contents(self._file, self.digest, self._state, state)
        except ValueError:
            if self._handle is not None:
                self._handle.close()
                self._handle = None
            raise
        self._state = state


def file_state(file: int | str) -> tuple[int, ...]:
    """What changes when a file, a path or descriptor, is written: size first."""
    found = os.stat(file)
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev


def check_contents(path: str, digest: str, before: tuple[int, ...], now: tuple[int, ...]) -> None:
    """ValueError unless a file that was touched, replaced or moved still has the same contents.

    digest: SHA-256 of what they were. before, now: its file_state() then and now.
    """
    what = f"it had {before[0]} bytes, now {now[0]}"
    if before[0] == now[0]:
        what = "it has other contents of the same size"
        if file_digest(Path(path)) == digest:
            return
    raise ValueError(f"data file {path!r} changed: {what}: start again from data that stays as it is")


# As many as a folder may hold.
@functools.lru_cache(maxsize=1024)
def _indexed(path: str, state: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """The PLACE [n] of each record, and the file's SHA-256: read once in a process, a large file once as long as it
    stays as it is."""
    if state[0] < _KEPT_FROM:
        return _index(path)
    name = hashlib.sha256(repr((path, state, PLACE)).encode()).hexdigest()[:40]
    kept = cache_folder("jsonl") / f"{name}.npz"
    found = load_kept(kept, ("index", "digest"))
    if found is not None:
        return found["index"], str(found["digest"])
    index, digest = _index(path)
    keep(kept, index=index, digest=np.array(digest))
    return index, digest


def _index(path: str) -> tuple[np.ndarray, str]:
    index, position, digest = bytearray(), 0, hashlib.sha256()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.isspace():
                index += packed_place(position, len(line), number)
            position += len(line)
            digest.update(line)
    return np.frombuffer(index, PLACE), digest.hexdigest()


def packed_place(start: int, length: int, line: int) -> bytes:
    """A PLACE as it lies in memory. ValueError for a record that is too long for it."""
    try:
        return _PLACE.pack(start, length, line)
    except struct.error as error:
        raise ValueError(f"line {line}: expected a record of less than 4 GiB, got {length} bytes") from error


def _is_spread(line: str) -> bool:
    """Whether a line of JSON breaks off between values, as a first line of JSON that is printed for reading does."""
    return line == "{" or line.endswith((",", "[", "{", ":"))
