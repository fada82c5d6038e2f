"""The records of a data source by index, whatever it is kept in."""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from qtarget_megatron.data.forms import AUTO
from qtarget_megatron.data.json_files import UNPACKERS, CompressedJson, open_json
from qtarget_megatron.data.jsonl import binary_kind
from qtarget_megatron.data.tables import KINDS, TableFile


class Records(Protocol):
    """Random access to the records of a file or folder. Records count from 0."""

    path: str
    # One of forms.FORMS; auto where there is no record to tell it.
    form: str

    def __len__(self) -> int:
        """Number of records."""

    @property
    def num_bytes(self) -> int:
        """Bytes of all records as JSON lines, about."""

    @property
    def digest(self) -> str:
        """SHA-256 of the contents, in hexadecimal: that of a file's bytes where there is one."""

    def where(self, index: int) -> str:
        """Where a record stands, for messages."""

    def record(self, index: int) -> dict[str, Any]:
        """A record as supervision.encode reads it (forms.canonical). ValueError names where it stands and what is wrong
        with it, which may be another form than that of the others."""

    def raw(self, index: int) -> dict[str, Any]:
        """A record with its fields as they were written."""

    def text(self, index: int) -> str:
        """A record as it was written, JSON in one line."""


class ConcatenatedRecords:
    """The records of several sources, one behind another, a Records.

    digest: SHA-256 over the sources' names and digests, in this order.
    form:   that of the first source with records; ValueError where another has another.
    """

    def __init__(self, path: str | os.PathLike[str], parts: Sequence[Records]):
        """path: what they are called together."""
        self.path, self._parts = str(path), tuple(parts)
        # Where each part ends.
        self._ends = list(itertools.accumulate(map(len, self._parts)))
        known = [part for part in self._parts if len(part)]
        self.form = known[0].form if known else AUTO
        for part in known:
            if part.form != self.form:
                raise ValueError(
                    f"{part.where(0)}: expected a record of the form {self.form}, as in {known[0].path}, got "
                    f"{part.form}: put them into different folders, or name the files one by one"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all records as JSON lines, about."""
        return sum(part.num_bytes for part in self._parts)

    @property
    def digest(self) -> str:
        known = [(os.path.basename(part.path), part.digest) for part in self._parts]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()

    def where(self, index: int) -> str:
        """As its source says it."""
        part, place = self._at(index)
        return part.where(place)

    def record(self, index: int) -> dict[str, Any]:
        """As of its source."""
        part, place = self._at(index)
        return part.record(place)

    def raw(self, index: int) -> dict[str, Any]:
        """As of its source."""
        part, place = self._at(index)
        return part.raw(place)

    def text(self, index: int) -> str:
        """As of its source."""
        part, place = self._at(index)
        return part.text(place)

    def _at(self, index: int) -> tuple[Records, int]:
        """A record's source, and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        number = bisect.bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def open_records(path: str | os.PathLike[str], form: str = AUTO) -> Records:
    """The records at a path: of a file, or of a folder as docs/data.md describes them.

    A file is what it holds, whatever its name. form: one of forms.FORMS, or auto: that of the first record. ValueError
    for a path that cannot be read, and for a first record of another form.
    """
    return _open_folder(Path(path), form) if os.path.isdir(path) else _open_file(path, _kind(path), form)


def _kind(path: str | os.PathLike[str]) -> str:
    try:
        with open(path, "rb") as file:
            return (binary_kind(file.read(16)) or ("text", ""))[0]
    except OSError as error:
        raise ValueError(f"data file {str(path)!r}: {error.strerror}") from error


def _open_file(path: str | os.PathLike[str], kind: str, form: str) -> Records:
    if kind in KINDS:
        return TableFile(path, form)
    return CompressedJson(path, kind, form) if kind in UNPACKERS else open_json(path, form)


def _open_folder(path: Path, form: str) -> ConcatenatedRecords:
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise ValueError(f"data folder {str(path)!r}: {error.strerror}") from error
    # A link whose file is gone is a file: it is named when it is opened.
    names = [entry.name for entry in entries if not entry.is_dir()]
    folders = [entry.name for entry in entries if entry.is_dir()]
    if "dataset_dict.json" in names:
        raise ValueError(
            f"data folder {str(path)!r} is a DatasetDict of {', '.join(folders) or 'nothing'}: name one of them, as "
            f"{path / (folders or ['train'])[0]}"
        )
    if {"state.json", "dataset_info.json"} <= set(names):
        return ConcatenatedRecords(path, [TableFile(path / name, form, mapped=True) for name in _saved_files(path)])
    # Hidden files, those of Spark, and what describes the data.
    names = [name for name in names if not name.startswith((".", "_")) and not name.lower().startswith("readme")]
    if not names:
        inside = f" (sub-folders are not searched: {', '.join(folders[:8])})" if folders else ""
        raise ValueError(f"data folder {str(path)!r}: expected data files in it, found none{inside}")
    kinds: dict[str, list[str]] = {}
    for name in names:
        kind = _kind(path / name)
        kinds.setdefault("arrow" if kind in KINDS[1:] else kind, []).append(name)
    if len(kinds) > 1:
        found = ", ".join(f"{kind} ({several[0]}, {len(several)} in all)" for kind, several in kinds.items())
        raise ValueError(
            f"data folder {str(path)!r}: expected files of one kind, got {found}: move the others elsewhere, or name "
            "one file"
        )
    (kind,) = kinds
    return ConcatenatedRecords(path, [_open_file(path / name, kind, form) for name in names])


def _saved_files(path: Path) -> list[str]:
    """The files that Dataset.save_to_disk wrote into a folder, in order."""
    try:
        names = [file["filename"] for file in json.loads((path / "state.json").read_text("utf-8"))["_data_files"]]
        if any(os.path.basename(name) != name or name in (".", "..") for name in names):
            raise ValueError("names of other folders")
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"data folder {str(path)!r}: expected a state.json that lists the data files of save_to_disk, got {error!r}"
        ) from error
    return names
