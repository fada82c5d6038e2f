"""A file that a long run appends to: it survives an end at any moment, and appears only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

_CHUNK = 1 << 22


class ResumableLines:
    """The lines of ``path``, collected in ``path.partial``.

    ``path.partial.json`` holds ``made_from``: the inputs and options that the lines depend on, by the name that the
    user knows them by. A later run goes on behind the last complete line if its own are the same.
    """

    def __init__(self, path: Path, made_from: Mapping[str, Any]):
        self.path, self.made_from = Path(path), dict(made_from)
        self._partial = self.path.with_name(f"{self.path.name}.partial")
        self._header = self.path.with_name(f"{self.path.name}.partial.json")
        self._file = None

    def check(self, *, overwrite: bool, inputs: Sequence[Path]) -> None:
        """Raise ValueError where the file cannot be written, or exists already, unless overwrite; writes nothing.

        inputs: files that must not be written to.
        """
        for source in inputs:
            for target in (self.path, self._partial, self._header):
                if _same_file(source, target):
                    raise ValueError(f"{target} is the input, which would be lost: choose another output")
        if not self.path.parent.is_dir():
            raise ValueError(f"{self.path}: there is no directory {self.path.parent}: create it")
        if self.path.is_dir():
            raise ValueError(f"{self.path} is a directory: expected the name of a file to write")
        if self.path.exists() and not overwrite:
            raise ValueError(f"{self.path} exists already: give --overwrite to replace it, or choose another output")
        if not self._partial.exists():
            return
        begun = self._begun()
        differing = sorted(k for k in begun.keys() | self.made_from.keys() if begun.get(k) != self.made_from.get(k))
        if differing:
            raise ValueError(
                f"{self._partial} was begun with a different {', '.join(differing)}: go on with the same, or delete "
                "it to start over"
            )

    def _begun(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._header.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            raise ValueError(
                f"{self._partial}: {self._header.name}, which says what it was made from, is missing or damaged: "
                "delete both to start over"
            ) from None

    def open(self) -> int:
        """How many complete lines are there already; an incomplete last one is dropped. Call after check()."""
        try:
            if not self._partial.exists():
                # The header first: lines without one could not be trusted.
                _write_atomically(self._header, json.dumps(self.made_from, indent=1) + "\n")
            self._file = open(self._partial, "a+b")
            count, end, position = 0, 0, 0
            self._file.seek(0)
            while block := self._file.read(_CHUNK):
                count += block.count(b"\n")
                if (last := block.rfind(b"\n")) >= 0:
                    end = position + last + 1
                position += len(block)
            self._file.truncate(end)
        except OSError as error:
            raise ValueError(f"{self._partial}: {error.strerror}") from error
        return count

    def append(self, lines: Iterable[str]) -> None:
        """Add lines, each without its line break; they are on disk when this returns."""
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ValueError(f"{self._partial}: {error.strerror}; run again to go on from here") from error

    def finish(self) -> None:
        """The lines are complete: give them their name."""
        self._file.close()
        os.replace(self._partial, self.path)
        self._header.unlink(missing_ok=True)


def _write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file that appears only as a whole."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def directory_digest(path: Path) -> str:
    """SHA-256 over name, size and time of change of each file in a directory: tells whether a model is the same."""
    entries = sorted(Path(path).iterdir())
    known = [(e.name, e.stat().st_size, e.stat().st_mtime_ns) for e in entries if e.is_file()]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _same_file(one: Path, other: Path) -> bool:
    return Path(one).resolve() == Path(other).resolve() or (
        Path(one).exists() and Path(other).exists() and os.path.samefile(one, other)
    )
