"""What a command prints of what torch and Megatron say: what a user can act on, once, on the first rank."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator
from typing import TextIO

from qtarget_megatron.megatron.runtime import cpu_platform

# On every start, of what is so by design or is said in one line by name_what_is_missing.
_KNOWN = (
    r"\s*(Transformer Engine and Apex are|Apex is|Only transformer-engine)\b",
    r"\s*It is recommended to use a ModelConfig",
    r"MimoModelConfig is experimental",
    r"Could not determine rank from torch\.distributed",  # a lone rank
    r"`torch\.distributed\.all_gather_into_tensor` is deprecated",  # Megatron calls it
)


def quiet() -> None:
    """Leave out the warnings of torch and Megatron on all ranks but the first, and there those that say nothing to a
    user; not where Python's own -W or PYTHONWARNINGS says what to show. Call it before Megatron is imported."""
    if sys.warnoptions:
        return
    if os.environ.get("RANK", "0") != "0":
        warnings.filterwarnings("ignore", module=r"(torch|megatron)\.")
        return
    for message in _KNOWN:
        warnings.filterwarnings("ignore", message=message)


def name_what_is_missing(args: argparse.Namespace) -> None:
    """Say on the first rank in one line what Megatron warns of in each of its modules; nothing on the CPU platform."""
    missing = all(importlib.util.find_spec(name) is None for name in ("transformer_engine", "apex"))
    if missing and args.rank == 0 and not cpu_platform.is_active():
        line = "without Transformer Engine and Apex: Megatron's local layers, torch's optimizers"
        print(f"qtarget_megatron: {line}", flush=True)


@contextlib.contextmanager
def without_arguments(*, shown: bool) -> Iterator[None]:
    """Within it, the list of all arguments that Megatron prints is left out of stdout, unless it is to be shown."""
    if shown:
        yield
        return
    stream = _WithoutArguments(sys.stdout)
    with contextlib.redirect_stdout(stream):
        try:
            yield
        finally:
            stream.finish()


class _WithoutArguments:
    """A text stream that passes on whole lines, but those of Megatron's list of arguments."""

    _FIRST, _LAST = "------------------------ arguments -", "-------------------- end of arguments -"

    def __init__(self, stream: TextIO):
        self._stream, self._rest, self._inside = stream, "", False

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._inside |= line.startswith(self._FIRST)
            if not self._inside:
                self._stream.write(f"{line}\n")
            elif line.startswith(self._LAST):
                self._inside = False
        return len(text)

    def finish(self) -> None:
        """Pass on a last line without an end."""
        if self._rest and not self._inside:
            self._stream.write(self._rest)

    def flush(self) -> None:
        self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
