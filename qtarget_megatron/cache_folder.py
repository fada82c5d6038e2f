"""Where this package keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder of this name in $QTARGET_CACHE_DIR, else $XDG_CACHE_HOME/qtarget_megatron, else
    ~/.cache/qtarget_megatron. It may not exist."""
    own = os.environ.get("QTARGET_CACHE_DIR")
    if own:
        return Path(own) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qtarget_megatron" / name
