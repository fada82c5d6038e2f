"""Where copies and results are kept that a later run can use again, and may be deleted at any time."""

from __future__ import annotations

import os
from pathlib import Path

# Names the folder that holds all of it.
VARIABLE = "QTARGET_CACHE_DIR"


def cache_folder(name: str) -> Path:
    """The folder of a name: in $QTARGET_CACHE_DIR, else in qtarget_megatron of $XDG_CACHE_HOME or ~/.cache.

    It need not exist yet.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute() / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtarget_megatron" / name


def cannot_write(what: str, folder: str | os.PathLike[str], error: OSError) -> ValueError:
    """The error of a copy that cannot be written to a folder."""
    why = str(error) if error.errno is None else os.strerror(error.errno)
    return ValueError(
        f"{what} cannot be written to {os.fspath(folder)}: {why}: make room there, or name another folder by {VARIABLE}"
    )
