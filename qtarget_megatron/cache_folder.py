"""Where copies and results are kept that a later run can use again, and may be deleted at any time."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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


def load_kept(path: Path, names: Sequence[str]) -> dict[str, np.ndarray] | None:
    """The arrays of these names that keep() wrote there; None where there is no whole file of them."""
    try:
        with np.load(path, allow_pickle=False) as kept:
            return {name: kept[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        return None


def keep(path: Path, **arrays: np.ndarray) -> str | None:
    """Write arrays for load_kept(); why that is not possible, None where it is."""
    new = path.with_name(f"{path.stem}-{uuid.uuid4().hex}.npz")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A dict of these types is what numpy's own stub takes for its other parameter.
        np.savez(new, **arrays)  # type: ignore[arg-type]
        new.replace(path)
    except OSError as error:
        try:
            new.unlink(missing_ok=True)
        except OSError:
            pass
        return error.strerror or str(error)
    return None
