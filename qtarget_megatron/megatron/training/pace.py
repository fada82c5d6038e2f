"""How fast a training is and what is left of it: a line now and then, below Megatron's own of the step."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from qtarget_megatron.megatron.runtime.logs import ANY_RANK

_log = logging.getLogger("qtarget_megatron")

# Between two lines, so that a log of quick steps is not twice as long.
_LINE_SECONDS = 10.0


class Pace:
    """Logs ``qtarget_megatron: 51,234 tokens/s, 1:02:03 left`` on the last rank, which prints Megatron's steps too.

    Logged at the first step behind each of Megatron's --log-interval, ten seconds after the line before or later.
    tokens/s: of all ranks since that line; --seq-length of each sample, padding included. left: at the mean pace of
    the steps of this run, without its first, which prepares more than it trains.
    """

    def __init__(self, args: argparse.Namespace):
        self._args = args
        self._step: int | None = None  # begun last
        self._first: tuple[float, int] | None = None  # when the second step of this run began, and its number
        self._last: tuple[float, int] | None = None  # the same of the line before, in samples

    def watched(self, forward_step: Callable) -> Callable:
        """The forward step, before which a line is logged where one is due."""

        def looked_at(data_iterator: Any, model: Any) -> Any:
            step = getattr(self._args, "curr_iteration", 0)
            if model.training and step != self._step:
                self._begin(step)
            return forward_step(data_iterator, model)

        return looked_at

    def _begin(self, step: int) -> None:
        begun, self._step = self._step, step
        if begun is None:
            return
        now, samples = time.monotonic(), self._args.consumed_train_samples
        if self._first is None:
            self._first, self._last = (now, step), (now, samples)
            return
        before, known = self._last
        if step % self._args.log_interval or now - before < _LINE_SECONDS:
            return
        self._last = now, samples
        if dist.get_rank() == dist.get_world_size() - 1:
            rate = (samples - known) * self._args.seq_length / (now - before)
            started, first = self._first
            left = timedelta(seconds=round((self._args.train_iters - step) * (now - started) / (step - first)))
            _log.info("%s tokens/s, %s left", f"{rate:,.0f}", left, extra=ANY_RANK)
