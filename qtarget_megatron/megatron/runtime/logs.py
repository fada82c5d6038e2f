"""What a command prints of the log: the package's lines, and of what torch and Megatron say what a user can act on.

The package logs under one name, qtarget_megatron, and sets up nothing when it is imported: where its lines go is its
user's choice. A command prints them (shown()); its process leaves out what torch and Megatron say at every start
(quiet()), unless Megatron's --logging-level is 10 or less.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TextIO

NAME = "qtarget_megatron"
# For ``extra`` of a line that is another rank's to say; all others are the first rank's.
ANY_RANK = {"any_rank": True}


class _Known(NamedTuple):
    """What is left out. source: of its module or logger; message: how it begins. Both are regular expressions."""

    source: str
    message: str
    reason: str


_KNOWN = (
    _Known("", r"\s*(Transformer Engine and Apex are|Apex is|Only transformer-engine)\b", "see name_what_is_missing"),
    _Known("", r"\s*It is recommended to use a ModelConfig", "how Megatron calls itself"),
    _Known("", r"MimoModelConfig is experimental", "not used here"),
    _Known("", r"Could not determine rank from torch\.distributed", "so it is for a lone rank"),
    _Known("", r"Please use DTensor instead and we are deprecating ShardedTensor", "how Megatron reads checkpoints"),
    _Known(r"torch\.distributed", r"`torch\.distributed\.\w+` is deprecated", "Megatron calls it"),
    _Known(r"torch\.distributed\.checkpoint", r"The argument order of load has been changed", "Megatron calls it"),
    _Known(
        r"torch\.distributed\.checkpoint",
        r"torch\.distributed is disabled, unavailable or uninitialized, assuming",
        "a checkpoint's arguments are read before the ranks meet",
    ),
    _Known(
        r"(qtarget_megatron\.)?megatron\.",
        r"The \.grad attribute of a Tensor that is not a leaf Tensor",
        "Megatron's pipeline looks at it; the CPU platform passes it on",
    ),
    _Known(r"torch\.utils\.cpp_extension", r"No CUDA runtime is found", "the CPU platform says so"),
    _Known(r"megatron\.core\.models\.gpt", r"GPTModel IS DEPRECATED", "--model-class says what is for whom"),
    _Known(
        r"megatron\.core\.models\.hybrid",
        r"HybridModel: pp_rank=|MuP for HybridModel is experimental",
        "a line for each stage; of MuP, what multiplies embeddings and logits is all that is used",
    ),
    _Known(
        r"megatron\.core\.dist_checkpointing", r"MCore's async save is deprecated", "also said without --async-save"
    ),
    _Known(
        r"megatron\.core\.rerun_state_machine",
        r"(RerunStateMachine initialized in|Setting RerunStateMachine) mode",
        "what --rerun-mode says, at each evaluation again",
    ),
    _Known(
        r"megatron\.core\.distributed\.",
        r"Setting up DistributedDataParallel|Number of buckets for|Using (all-reduce|reduce-scatter) for",
        "a line for each parameter, and arguments, which --log-arguments shows",
    ),
    _Known(
        r"megatron\.core\.distributed\.fsdp\.",
        r"Using Megatron-FSDP without|Detected Megatron Core",
        "on every rank, with and without FSDP",
    ),
    _Known(r"megatron\.core\.optimizer", r"Setting up optimizer with config", "arguments, which --log-arguments shows"),
)
# Megatron prints it without a logger, for a default of its own that the layout overrules.
_PRINTED = "WARNING: Setting args.overlap_p2p_comm and args.align_param_gather to False"
# Where warnings are the same on every rank, but for what one rank alone can know: a result that is wrong there, memory
# that it lacks.
_SAME_ON_RANKS = r"(torch|megatron|transformers|qtarget_megatron)(\.|$)"
_OF_ONE_RANK = ("megatron.core.rerun_state_machine", "megatron.core.transformer.utils", "megatron.core.fault_injector")


def is_first_rank() -> bool:
    """Whether this is the first rank, by what the launcher says: a process group need not exist yet."""
    return int(os.environ.get("RANK", "0")) == 0


def of(name: str) -> logging.Logger:
    """The logger of the lines that begin with a name: a command's, or that of the package."""
    return logging.getLogger(NAME if name == NAME else f"{NAME}.{name}")


@contextlib.contextmanager
def shown() -> Iterator[None]:
    """Within it the package's lines are printed, the first rank's and those of ANY_RANK, and whatever is an error.

    No other handler gets them, so Megatron's, which is on once that is imported, does not print them again.
    """
    log = logging.getLogger(NAME)
    if any(isinstance(handler, _Printed) for handler in log.handlers):
        yield
        return
    handler = _Printed()
    handler.addFilter(_is_for_this_rank)
    handler.setFormatter(_Line())
    before = log.level, log.propagate
    log.addHandler(handler)
    log.setLevel(log.level or logging.INFO)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before[0])
        log.propagate = before[1]


def quiet(words: Sequence[str]) -> None:
    """Leave out what _KNOWN says, and on all ranks but the first the warnings that are the same on each.

    words: of the command line. Call it in a process that is a command's, before Megatron is imported. Python's own -W
    and PYTHONWARNINGS go before where they are given.
    """
    if _logging_level(words) <= logging.DEBUG:
        return
    # Only a handler sees the records of all modules; Megatron adds none where there is one.
    everything = _Printed()
    everything.setFormatter(logging.Formatter(logging.BASIC_FORMAT))
    logging.basicConfig(handlers=[everything], level=logging.INFO)
    own = (handler for name in ("torch", "torch.distributed") for handler in logging.getLogger(name).handlers)
    for handler in (everything, *own):
        handler.addFilter(_says_something)
    if not is_first_rank():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if sys.warnoptions:
        return
    for known in _KNOWN:
        warnings.filterwarnings("ignore", message=known.message, module=known.source)
    if not is_first_rank():
        warnings.filterwarnings("ignore", module=_SAME_ON_RANKS)


def _logging_level(words: Sequence[str]) -> int:
    """Megatron's --logging-level, or what stands for it in the environment."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--logging-level", type=int)
    with contextlib.suppress(argparse.ArgumentError, ValueError):
        given = parser.parse_known_args(list(words))[0].logging_level
        return int(os.environ.get("MEGATRON_LOGGING_LEVEL", logging.INFO)) if given is None else given
    return logging.INFO


def _is_for_this_rank(record: logging.LogRecord) -> bool:
    return is_first_rank() or record.levelno >= logging.ERROR or getattr(record, "any_rank", False)


def _says_something(record: logging.LogRecord) -> bool:
    if record.levelno >= logging.ERROR:
        return True
    if record.levelno == logging.WARNING and not is_first_rank() and re.match(_SAME_ON_RANKS, record.name):
        if not record.name.startswith(_OF_ONE_RANK):
            return False
    text = record.getMessage()
    return not any(re.match(known.source, record.name) and re.match(known.message, text) for known in _KNOWN)


class _Printed(logging.Handler):
    """A handler that prints: warnings and errors to stderr, all else to stdout, as these are at that moment."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            file = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
            file.write(f"{self.format(record)}\n")
            file.flush()
        except Exception:
            self.handleError(record)


class _Line(logging.Formatter):
    """``qtarget_megatron: message``, and of a child of that logger, a command's, ``score: message``."""

    _LEVELS = ((logging.ERROR, "error: "), (logging.WARNING, "WARNING: "))

    def format(self, record: logging.LogRecord) -> str:
        level = next((word for least, word in self._LEVELS if record.levelno >= least), "")
        return f"{record.name.removeprefix(f'{NAME}.')}: {level}{super().format(record)}"


def name_what_is_missing() -> None:
    """Say in one line what Megatron warns of in each of its modules."""
    if all(importlib.util.find_spec(name) is None for name in ("transformer_engine", "apex")):
        of(NAME).info("without Transformer Engine and Apex: Megatron's local layers, torch's optimizers")


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
            if not self._inside and not line.startswith(_PRINTED):
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
