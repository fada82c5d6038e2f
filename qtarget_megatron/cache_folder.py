"""Where this package keeps what it can make again, and how: arrays in files that appear as a whole, or not at all."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def cache_folder(name: str) -> Path:
    """A folder of this name in $QTARGET_CACHE_DIR, else $XDG_CACHE_HOME/qtarget_megatron, else
    ~/.cache/qtarget_megatron. It may not exist."""
    own = os.environ.get("QTARGET_CACHE_DIR")
    if own:
        return Path(own) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtarget_megatron" / name


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
