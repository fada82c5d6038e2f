"""What the command-line tools share: errors of one line, and output on one rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import torch.distributed as dist

from qtarget_megatron.megatron.launch import is_bad_input


def exit_code(name: str, command: Callable[[], int]) -> int:
    """What command() returns; 2 where it raises the ValueError of bad input, which becomes one line on stderr."""
    try:
        return command()
    except ValueError as error:
        if not is_bad_input(error):
            raise
        print_once(f"{name}: error: {error}", file=sys.stderr)
        return 2


def print_once(line: str, file=None) -> None:
    """Print on the first rank."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(line, file=file, flush=True)


def leave(code: int) -> None:
    """End the process in order: process groups first."""
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)
