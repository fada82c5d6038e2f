"""Files and directories that a long run writes: they survive an end at any moment, and appear only when complete."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from io import BufferedRandom
from pathlib import Path
from typing import Any

from qtarget_megatron import output_lock

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
        self._lock = self.path.with_name(f".{self.path.name}.lock")
        self._file: BufferedRandom | None = None

    def check(self, *, overwrite: bool, inputs: Sequence[Path]) -> None:
        """Raise ValueError where the file cannot be written, or exists already, unless overwrite; writes nothing.

        inputs: files that must not be written to.
        """
        for source in inputs:
            for target in (self.path, self._partial, self._header):
                if _same_file(source, target):
                    raise ValueError(f"{target} is the input, which would be lost: choose another output")
        if not os.path.isdir(self.path.parent):
            raise ValueError(f"{self.path}: there is no directory {self.path.parent}: create it")
        if os.path.isdir(self.path):
            raise ValueError(f"{self.path} is a directory: expected the name of a file to write")
        if os.path.exists(self.path) and not overwrite:
            raise ValueError(f"{self.path} exists already: give --overwrite to replace it, or choose another output")
        if not os.path.exists(self._partial):
            return
        begun = self._begun()
        _check_same(self._partial, begun, self.made_from, begun.keys() | self.made_from.keys())

    def reserve(self) -> None:
        """Keep other processes from writing it until finish() or the end of this one. Call after check().

        ValueError where another process writes it, or the folder cannot be written to.
        """
        output_lock.claim(self._lock, str(self.path))

    def begun(self) -> dict[str, Any]:
        """What the lines of an earlier run were made from, which a run may go on with; empty without such lines."""
        return self._begun() if self._partial.exists() else {}

    def num_bytes(self) -> int:
        """Bytes of the lines that are there already."""
        return self._partial.stat().st_size if self._partial.exists() else 0

    def _begun(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._header.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise ValueError(
                f"{self._partial}: {self._header.name}, which says what it was made from, is missing or damaged: "
                "delete both to start over"
            ) from None

    def open(self) -> int:
        """How many complete lines are there already; an incomplete last one is dropped. Call after check()."""
        self.reserve()
        try:
            if not self._partial.exists():
                # The header first: lines without one could not be trusted.
                _write_atomically(self._header, json.dumps(self.made_from, indent=1) + "\n")
            file = self._file = open(self._partial, "a+b")
            count, end, position = 0, 0, 0
            file.seek(0)
            while block := file.read(_CHUNK):
                count += block.count(b"\n")
                if (last := block.rfind(b"\n")) >= 0:
                    end = position + last + 1
                position += len(block)
            file.truncate(end)
        except OSError as error:
            raise ValueError(f"{self._partial}: {error.strerror}") from error
        return count

    def append(self, lines: Iterable[str]) -> None:
        """Add lines, each without its line break; they are on disk when this returns. Call after open()."""
        assert self._file is not None
        try:
            self._file.write("".join(f"{line}\n" for line in lines).encode())
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ValueError(f"{self._partial}: {error.strerror}; run again to go on from here") from error

    def finish(self) -> None:
        """The lines are complete: give them their name. Call after open()."""
        assert self._file is not None
        self._file.close()
        os.replace(self._partial, self.path)
        self._header.unlink(missing_ok=True)
        output_lock.release(self._lock)


class ResumableDirectory:
    """A directory that is filled under another name, ``.NAME.incomplete`` beside it, and gets its own when complete.

    made_from: as of ResumableLines. A later run with the same finds the files that were recorded. None: nothing that an
    earlier run left is of use. One process opens and finishes; each process records the files that it wrote.
    """

    def __init__(self, path: str | Path, made_from: Mapping[str, Any] | None = None):
        self.path, self._made_from = Path(path).absolute(), made_from
        self.folder = self.path.with_name(f".{self.path.name}.incomplete")
        self._records = self.folder / ".complete"
        self._header = self._records / "made-from.json"
        self._lock = self.path.with_name(f".{self.path.name}.lock")

    def check(self) -> None:
        """ValueError where the directory cannot be written, or the folder holds what is not ours to delete, or was made
        from something else. Writes nothing.

        Of what the folder was made from only what this run names is compared: it may know more later.
        """
        try:
            check_output_directory(self.path)
            begun = self._begun()
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}: choose another output") from error
        if begun is not None and self._made_from is not None:
            _check_same(self.folder, begun, self._made_from, self._made_from.keys())

    def reserve(self) -> None:
        """As of ResumableLines; one process."""
        output_lock.claim(self._lock, str(self.path))

    def _begun(self) -> dict[str, Any] | None:
        """What the folder was made from; None where nothing was begun."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise ValueError(f"{self.folder}: expected a directory of ours or none, got a file or link; delete it")
        if not self.folder.exists() or {path.name for path in self.folder.iterdir()} <= {self._records.name}:
            return None
        try:
            return dict(json.loads(self._header.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, RecursionError):
            raise ValueError(
                f"{self.folder}: {self._header.name}, which says what it was made from, is missing or damaged: delete "
                "the folder to start over"
            ) from None

    def open(self) -> bool:
        """Make the folder; True where files of an earlier run are in it. One process, before any other writes."""
        self.check()
        self.reserve()
        try:
            if self._made_from is not None and self._begun() is not None:
                return True
            if self.folder.exists():
                shutil.rmtree(self.folder)
            self._records.mkdir(parents=True)
            # Before any file: files of unknown origin could not be trusted.
            _write_atomically(self._header, json.dumps(self._made_from or {}, indent=1) + "\n")
        except OSError as error:
            raise ValueError(f"{self.folder}: {error.strerror}") from error
        return False

    def holds(self, file: str) -> bool:
        """Whether a file was recorded and is still what it was then: this reads it."""
        return self.recorded(file) and self._record(file).read_text() == file_digest(self.folder / file)

    def recorded(self, file: str) -> bool:
        """Whether a file is there and was recorded, by this run or an earlier one."""
        return self._record(file).is_file() and (self.folder / file).is_file()

    def record(self, file: str) -> None:
        """A file is complete: put it on the disk, and remember its digest."""
        sync(self.folder / file)
        _write_atomically(self._record(file), file_digest(self.folder / file))

    def _record(self, file: str) -> Path:
        return self._records / f"{file}.sha256"

    def _files(self) -> list[Path]:
        return sorted(p for p in self.folder.rglob("*") if p.is_file() and self._records not in p.parents)

    def digests(self) -> dict[str, str]:
        """File -> SHA-256, of all files; those that were recorded are not read again."""
        names = [path.relative_to(self.folder).as_posix() for path in self._files()]
        return {
            name: self._record(name).read_text() if self.recorded(name) else file_digest(self.folder / name)
            for name in names
        }

    def finish(self) -> None:
        """The directory is complete: give it its name. One process, when all others are done."""
        check_output_directory(self.path)
        for folder in {self.folder, *(path.parent for path in self._files())}:
            sync(folder)
        os.rename(self.folder, self.path)
        # Now: a folder without records is not ours to go on with, a whole directory with them is whole.
        shutil.rmtree(self.path / self._records.name)
        sync(self.path.parent)
        output_lock.release(self._lock)


def check_output_directory(path: str | Path) -> None:
    """Raise ValueError if ``path`` could not become a directory of ours. Writes nothing.

    It must not exist, or be an empty directory, and its parent must be a directory. Worth calling
    before hours of training.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: expected a new or empty directory, got a file or link; choose another")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path}: expected a new or empty directory, got one with files in it; choose another or empty it"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected its parent to be a directory, found none; create {path.absolute().parent}")


def check_space(folder: Path, needed: int, *, most: int = 0) -> str | None:
    """ValueError where the disk of an existing folder has less than so many bytes left.

    most: where the size is not known exactly, the most there could be; a warning where there is no room for that.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder}: expected {needed / 1e9:.1f} GB of free disk space for what is to be written, found "
            f"{free / 1e9:.1f} GB; make room or write elsewhere"
        )
    if free < most:
        return f"{folder}: up to {most / 1e9:.1f} GB will be written, there are {free / 1e9:.1f} GB of free disk space"
    return None


def sync(path: Path) -> None:
    """Have the kernel put a file or folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_same(what: Path, begun: Mapping[str, Any], made_from: Mapping[str, Any], keys: Iterable[str]) -> None:
    if differing := sorted(key for key in keys if begun.get(key) != made_from.get(key)):
        raise ValueError(
            f"{what} was begun with a different {', '.join(differing)}: go on with the same, or delete it to start over"
        )


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
