"""Records of files that hold JSON otherwise than as plain lines: an array of records, compressed lines or arrays.

The text is split, never converted: a record is what it is in a JSON lines file, whatever the others look like.
"""

from __future__ import annotations

import bz2
import codecs
import functools
import gzip
import logging
import lzma
import mmap
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import IO, Any

import filelock
import numpy as np

from qtarget_megatron.cache_folder import cache_folder, cannot_write
from qtarget_megatron.data.forms import AUTO
from qtarget_megatron.data.jsonl import PLACE, JsonlFile, packed_place
from qtarget_megatron.data.source_file import SourceFile
from qtarget_megatron.resumable import file_digest

_log = logging.getLogger("qtarget_megatron")
# Everything up to what opens or closes an object or array; what does so in a string counts not.
_TO_BRACKET = re.compile(rb'(?:[^][{}"]++|"(?:[^"\\]++|\\.)*+")*+[][{}]', re.DOTALL)
# Bytes in which a file's first character is sought.
_HEAD = 1 << 16


def open_json(
    path: str | os.PathLike[str], form: str = AUTO, *, unpacked: str | os.PathLike[str] | None = None
) -> JsonlFile:
    """The records of a file of JSON lines or of one JSON array. form, unpacked: as of JsonlFile."""
    file = str(unpacked or path)
    try:
        with open(file, "rb") as opened:
            head = opened.read(_HEAD).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise ValueError(f"data file {file!r}: {error.strerror}") from error
    return (JsonArrayFile if head.startswith(b"[") else JsonlFile)(path, form, unpacked=unpacked)


class JsonArrayFile(JsonlFile):
    """Random access to the records of a file that is one JSON array of objects, however they are spread over lines.

    As JsonlFile; ``where`` names the line in which a record begins.
    """

    def _read_index(self) -> tuple[np.ndarray, str]:
        return _array_indexed(os.path.abspath(self._file), self._state)

    def text(self, index: int) -> str:
        """A record as it stands in the file, in one line."""
        # Line breaks stand between values alone: in a string record() refuses them.
        return self._written(index).replace("\r", " ").replace("\n", " ")


@functools.lru_cache(maxsize=1024)
def _array_indexed(path: str, state: tuple[int, ...]) -> tuple[np.ndarray, str]:
    """As _indexed of JsonlFile, of the objects of an array. ValueError with the line for one that is none."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        return _array_index(text), file_digest(Path(path))


def _array_index(text: mmap.mmap) -> np.ndarray:
    # depth: how many brackets are open. begin, end: of the newest object. place: up to where the text is read.
    index, line = bytearray(), 1

    def check(found: bytes, expected: bytes) -> None:
        """What stands next to an object, and count its lines."""
        nonlocal line
        line += found.count(b"\n")
        if found.strip() != expected:
            wanted = "a comma" if expected == b"," else "nothing"
            came = found[:40].decode(errors="replace").strip()
            raise ValueError(f"line {line}: expected {wanted} next to an object of the array, got {came!r}")

    depth = begin = end = place = 0
    while (token := _TO_BRACKET.match(text, place)) is not None:
        place = token.end()
        opens = text[place - 1] in b"[{"
        if depth == 0:
            check(text[: place - 1], codecs.BOM_UTF8 if text[:3] == codecs.BOM_UTF8 else b"")
            depth, end = 1, place
        elif depth == 1:
            check(text[end : place - 1], b"," if index and opens else b"")
            if not opens:
                check(text[place:], b"")
                return np.frombuffer(index, PLACE)
            if text[place - 1] != ord("{"):
                raise ValueError(f"line {line}: expected an array of objects, got an array in it")
            depth, begin = 2, place - 1
        else:
            depth += 1 if opens else -1
            if depth == 1:
                end = place
                index += packed_place(begin, end - begin, line)
                line += text[begin:end].count(b"\n")
    raise ValueError(f"line {line}: expected the end of the JSON array, got the end of the file")


def _open_zstd(path: str) -> IO[bytes]:
    try:
        import pyarrow
    except ImportError as error:
        raise ValueError(
            f"data file {path!r} is zstd, which pyarrow reads ({error}): pip install 'qtarget_megatron[data]' (or "
            f"unpack it: zstd -d {path})"
        ) from None
    stream: IO[bytes] = pyarrow.input_stream(path, compression="zstd")
    return stream


# What jsonl.binary_kind calls a compressed file -> what opens it.
UNPACKERS: dict[str, Any] = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open, "zstd": _open_zstd}


class CompressedJson:
    """The records of a compressed file of JSON lines or of one JSON array, a Records.

    It is unpacked once, into cache_folder("unpacked"), under a name that its contents alone decide. ``where`` names
    the line behind unpacking.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, form: str = AUTO):
        self.path = str(path)
        self._source = SourceFile(path)
        self._file = open_json(path, form, unpacked=_unpacked(self._source, kind))
        self.form = self._file.form

    def __len__(self) -> int:
        return len(self._file)

    @property
    def num_bytes(self) -> int:
        """Bytes of all records, unpacked."""
        return self._file.num_bytes

    @property
    def digest(self) -> str:
        """SHA-256 of the compressed file."""
        return self._source.digest

    def where(self, index: int) -> str:
        """``path:line`` of a record, for messages."""
        return self._file.where(index)

    def record(self, index: int) -> dict[str, Any]:
        """As of JsonlFile; ValueError too once the compressed file is gone or has changed."""
        self._source.check()
        return self._file.record(index)

    def raw(self, index: int) -> dict[str, Any]:
        """As of JsonlFile; ValueError too once the compressed file is gone or has changed."""
        self._source.check()
        return self._file.raw(index)

    def text(self, index: int) -> str:
        """As of JsonlFile; ValueError too once the compressed file is gone or has changed."""
        self._source.check()
        return self._file.text(index)


def _unpacked(source: SourceFile, kind: str) -> Path:
    """What a compressed file unpacks to. The first of many processes writes it, the others wait."""
    folder = cache_folder("unpacked")
    target, partial = folder / f"{source.digest}.json", folder / f"{source.digest}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{target}.lock"):
            if not target.exists():
                _log.info("%s is unpacked to %s", source.path, target)
                _unpack(source.path, kind, partial)
                os.replace(partial, target)
    except OSError as error:
        raise cannot_write(f"data file {source.path!r}, unpacked,", folder, error) from error
    return target


def _unpack(path: str, kind: str, target: Path) -> None:
    """Write what a compressed file unpacks to; all of it, or no file. ValueError for a file that is damaged."""
    try:
        with UNPACKERS[kind](path) as packed, open(target, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        target.unlink(missing_ok=True)
        # An error of the system has a number, one of the contents has none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"data file {path!r} is damaged ({kind}): {error}: get it again") from error
