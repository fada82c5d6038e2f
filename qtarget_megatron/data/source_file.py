"""A data file of which a copy or an index is read: what it held when it was opened, and whether it still does."""

from __future__ import annotations

import functools
import os
from pathlib import Path

from qtarget_megatron.data.jsonl import check_contents, file_state
from qtarget_megatron.resumable import file_digest


class SourceFile:
    """A file that is to stay as it is.

    digest: SHA-256 of its bytes, in hexadecimal; read once in a process.
    ValueError where it cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = str(path)
        try:
            self._state = file_state(self.path)
            self.digest = _digest(os.path.abspath(self.path), self._state)
        except OSError as error:
            raise ValueError(f"data file {self.path!r}: {error.strerror}") from error

    def check(self) -> None:
        """ValueError once the file is gone or has other contents; looked for by its size and time."""
        try:
            if (now := file_state(self.path)) != self._state:
                check_contents(self.path, self.digest, self._state, now)
                self._state = now
        except OSError as error:
            raise ValueError(f"data file {self.path!r}: {error.strerror}: start again from data that stay") from error


@functools.lru_cache(maxsize=1024)
def _digest(path: str, state: tuple[int, ...]) -> str:
    return file_digest(Path(path))
