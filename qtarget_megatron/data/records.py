"""The records of a data source by index, whatever it is kept in."""

from __future__ import annotations

import os
from typing import Any, Protocol

from qtarget_megatron.data.forms import AUTO
from qtarget_megatron.data.jsonl import JsonlFile


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


def open_records(path: str | os.PathLike[str], form: str = AUTO) -> Records:
    """The records at a path. form: one of forms.FORMS, or auto: that of the first record. ValueError for a path that
    cannot be read, and for a first record of another form."""
    return JsonlFile(path, form)
