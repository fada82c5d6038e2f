"""What one rank does or says for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from qtarget_megatron.megatron.runtime.launch import is_bad_input
from qtarget_megatron.megatron.runtime.logs import is_first_rank


def on_first_rank(function: Callable[[], Any]) -> Any:
    """What function() returns on the first rank; every rank gets it, or the ValueError of bad input. Collective."""
    outcome: tuple[Any, str | None] | None = None
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


def print_once(line: str) -> None:
    """Print on the first rank what a command was started for; what it says meanwhile goes through the log."""
    if is_first_rank():
        print(line, flush=True)
