"""What the command-line tools share: errors of one line, and output on one rank."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from qtarget_megatron import output_lock
from qtarget_megatron.megatron.launch import is_bad_input
from qtarget_megatron.megatron.limits import what_ran_out


def exit_code(name: str, command: Callable[[], int]) -> int:
    """What command() returns; 2 where it raises the ValueError of bad input, 1 where something has run out (memory,
    files, ...): either becomes one line on stderr."""
    try:
        return command()
    except ValueError as error:
        if not is_bad_input(error):
            raise
        print_error(name, error)
        return 2
    except (OSError, MemoryError, RuntimeError) as error:
        if (line := what_ran_out(error)) is None:
            raise
        print(f"{name}: error on rank {os.environ.get('RANK', '0')}: {line}", file=sys.stderr, flush=True)
        return 1
    finally:
        output_lock.release_all()


def print_error(name: str, error: ValueError) -> None:
    """One line on stderr from the first rank. Another rank speaks up only if it is still there a moment later: where
    all fail alike, the launcher has ended it by then."""
    text = os.environ.get("RANK", "0")
    rank = int(text) if text.isdigit() else 0
    # Megatron's handler, where it is on already, would keep a rank that the launcher ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank != 0:
        time.sleep(5)
    where = f" on rank {rank}" if rank != 0 else ""
    print(f"{name}: error{where}: {error}", file=sys.stderr, flush=True)


def on_first_rank(function: Callable[[], Any]) -> Any:
    """What function() returns on the first rank; every rank gets it, or the ValueError of bad input. Collective."""
    outcome = None
    if dist.get_rank() == 0:
        try:
            outcome = (function(), None)
        except ValueError as error:
            if not is_bad_input(error):
                raise
            outcome = (None, str(error))
    box = [outcome]
    dist.broadcast_object_list(box, src=0)
    value, message = box[0]
    if message is not None:
        raise ValueError(message)
    return value


def is_first_rank() -> bool:
    """Whether this is the first rank, by what the launcher says: a process group need not exist yet."""
    return int(os.environ.get("RANK", "0")) == 0


def print_once(line: str, file=None) -> None:
    """Print on the first rank."""
    if is_first_rank():
        print(line, file=file, flush=True)


def leave(code: int) -> None:
    """End the process in order: process groups first."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
