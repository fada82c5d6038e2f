"""What ends a training, in one line: what happened, on which rank, and what to do."""

from __future__ import annotations

import argparse
import re
import time
import traceback
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from qtarget_megatron.megatron.faults.limits import what_ran_out
from qtarget_megatron.megatron.faults.resume_point import advice
from qtarget_megatron.megatron.faults.watchdog import Watchdog

SKIP_NAN_HINT = "give --qtarget-on-nan skip to go on without such steps"
_COURTESY = 2.0  # seconds
_LOST = re.compile(r"gloo/transport|Connection (closed|reset) by peer")  # NCCL has a class of its own
_WORKER_ENDED = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([\w ]+)|exited)")
# Megatron's own count of iterations starts anew with each start.
_REJECTED = re.compile(r"Rank \d+, node (\S+), device \d+, iteration \d+: ")


class Fault(RuntimeError):
    """The end of a training in one line.

    already_reported: True where another rank has printed the cause; then this one prints nothing.
    """

    def __init__(self, line: str, *, already_reported: bool = False):
        super().__init__(line)
        self.already_reported = already_reported


class EndedEarly(Exception):
    """The end of a training before its last step, or before its export, that somebody asked for. code: to exit with."""

    def __init__(self, line: str, code: int):
        super().__init__(line)
        self.code = code


class NotFinite(RuntimeError):
    """A loss that is NaN or infinite, with the samples of its micro-batch."""


def explained(error: BaseException, args: argparse.Namespace, watchdog: Watchdog) -> Fault | None:
    """The line for what the user can do something about; None for everything else, which keeps its traceback and gets
    a note: how far the training was, and how it goes on."""
    what, secondary = _explain(error)
    if what is None:
        if isinstance(error, Exception) and not isinstance(error, EndedEarly):
            # This rank says it itself: the others need not say that it is gone.
            watchdog.tell()
        error.add_note(f"in step {watchdog.step}; {advice(args)}")
        return None
    if secondary:
        # The rank where it began speaks first, if it can.
        time.sleep(_COURTESY)
    already_reported = not watchdog.tell() and secondary
    return Fault(f"step {watchdog.step}: {what}; {advice(args)}", already_reported=already_reported)


def _explain(error: BaseException) -> tuple[str | None, bool]:
    """What happened; whether it is the consequence of what another rank has met."""
    if isinstance(error, CheckpointException):
        ranks = ", ".join(map(str, sorted(error.failures)))
        action = {"write": "written", "read": "read"}.get(error.args[0], "exchanged")
        if not ranks:
            return f"a checkpoint could not be {action} on another rank", True
        found = (_reason(failure) for failure in error.failures.values())
        reason = next(filter(None, found), "disk full? the reason stands above")
        return f"a checkpoint could not be {action} on rank(s) {ranks} ({reason})", False
    if isinstance(error, ValueError) and str(error).startswith("Caught ValueError in DataLoader worker"):
        # torch appends the worker's traceback, which ends in the line that says what is wrong with the data.
        return str(error).strip().splitlines()[-1].removeprefix("ValueError: "), False
    if isinstance(error, ValueError):
        is_export = isinstance(error.__cause__, OSError) and what_ran_out(error.__cause__) is not None
        return (f"the export could not be written: {error}", False) if is_export else (None, False)
    if isinstance(error, NotFinite):
        return str(error), False
    if (line := what_ran_out(error)) is not None:
        return line, False
    if isinstance(error, RuntimeError):
        if Path(traceback.extract_tb(error.__traceback__)[-1].filename).name == "rerun_state_machine.py":
            return f"{_REJECTED.sub('', str(error))}: {SKIP_NAN_HINT}", False
        if ended := _WORKER_ENDED.search(str(error)):
            # torch knows the signal at times only.
            hint = (
                " (out of memory? fewer --num-workers need less)" if ended[2] in (None, "Killed") else f": {ended[2]}"
            )
            return f"data worker {ended[1].strip()} has ended{hint}", False
        if isinstance(error, dist.DistError) or _LOST.search(str(error)):
            # Without the place in gloo's sources, and its advice.
            reason = re.sub(r"^\[\S+\] ", "", str(error).strip().splitlines()[0]).split(". ")[0]
            return f"another rank has ended, or does not answer ({reason[:200]})", True
    return None, False


def _reason(failure: Any) -> str | None:
    """What a rank's failure to save or load was, as torch passes it on: (exception, stack), or an exception."""
    error = failure[0] if isinstance(failure, tuple) else failure
    if not isinstance(error, BaseException):
        return None
    return what_ran_out(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
