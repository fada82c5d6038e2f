"""Losses that are NaN or infinite: what happens with their micro-batch, and who is told."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import RerunMode, get_rerun_state_machine
from megatron.training import get_args
from torch import Tensor

from qtarget_megatron.megatron.faults.explained import SKIP_NAN_HINT, NotFinite
from qtarget_megatron.megatron.runtime.logs import ANY_RANK

_log = logging.getLogger("qtarget_megatron")


def _numbered(records: Sequence[int]) -> str:
    return f"record(s) {list(records)} (counted from 0)"


class LossCheck:
    """Looks at the loss of every micro-batch.

    On a GPU a training step's are looked at together, with its last micro-batch, before any parameter changes: the host
    waits for the device once a step.
    """

    def __init__(self, record_names: Callable[[Sequence[int]], str] = _numbered) -> None:
        """record_names: how records are named in messages, by their numbers."""
        self._record_names = record_names
        self._unseen: list[tuple[Tensor, Tensor]] = []

    def look(self, loss_sum: Tensor, samples: Tensor, on_nan: str, *, in_training: bool) -> None:
        """One micro-batch's.

        on_nan:  "stop" raises NotFinite, "skip" logs a warning in training.
        samples: its records.

        Under --rerun-mode validate_results Megatron's own procedure takes the place of the exception.
        """
        machine = get_rerun_state_machine()
        if on_nan == "stop" and machine.get_mode() != RerunMode.DISABLED:
            machine.validate_result(
                result=loss_sum,
                rejection_func=lambda value: not torch.isfinite(value).item(),
                message="finite loss",
                tolerance=0.0,
                fatal=True,
            )
            return
        self._unseen.append((loss_sum, samples))
        if loss_sum.is_cuda and in_training and len(self._unseen) < get_num_microbatches():
            return
        seen, self._unseen = self._unseen, []
        for value, (_, records) in zip(torch.stack([loss for loss, _ in seen]).tolist(), seen, strict=True):
            if not math.isfinite(value):
                self._tell(value, records, on_nan, in_training=in_training)

    def _tell(self, value: float, samples: Tensor, on_nan: str, *, in_training: bool) -> None:
        where = f"the loss of {self._record_names(samples.tolist())} is {value} on rank {dist.get_rank()}"
        if on_nan == "stop":
            raise NotFinite(f"{where}: {SKIP_NAN_HINT}")
        if in_training and parallel_state.get_tensor_model_parallel_rank() == 0:
            _log.warning("step %d is skipped: %s", get_args().curr_iteration + 1, where, extra=ANY_RANK)
