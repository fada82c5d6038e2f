"""Who keeps the others waiting? A thread on every rank that says so before a collective times out.

A rank that stops, or sleeps, leaves the others in a collective, which ends after --distributed-timeout-minutes without
a name (NCCL's watchdog then ends the process). The thread of each rank writes where the rank is to the launcher's
key-value store. When nothing has moved for a third of the timeout, the first rank (or the last one, where that is the
first that hangs) reads what all have written and prints one line.

Cost: nothing in a step but a count. The thread writes about a hundred bytes every ten seconds at most; from thousands
of ranks that is a few hundred writes a second to the store. All of them are read only when nothing moves.
"""

from __future__ import annotations

import argparse
import json
import logging
import socket
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from qtarget_megatron.megatron.runtime.logs import ANY_RANK

_log = logging.getLogger("qtarget_megatron")
_READING = "next_batch"
# Where Python waits for a collective, or for its result.
_WAITING = ("torch/distributed/", "p2p_communication.py", "param_and_grad_buffer.py")
_FAULT = "fault"


@dataclass(frozen=True)
class Report:
    """Where a rank is.

    beat:  counts its reports.
    count: of the forward passes it has begun.
    step:  it is in.
    place: of its main thread where it has not moved for a while: waiting for others, reading its data, or a line of
           code.
    """

    beat: int
    count: int
    step: int
    host: str
    place: str = ""


class Watchdog:
    """Watches one training; wraps Megatron's forward step. With store None, for a single rank, it only counts."""

    def __init__(self, args: argparse.Namespace, store: dist.Store | None, rank: int, world_size: int):
        self._args, self._rank, self._world_size = args, rank, world_size
        self._main, self._count, self._first_step = threading.get_ident(), 0, 0
        self._ended = threading.Event()
        self._host = socket.gethostname()
        self._thread: threading.Thread | None = None
        # A connection of its own: the main thread may wait in the other.
        self._store = None if store is None else store.clone()  # type: ignore[attr-defined]  # not in torch's stubs

    def watched(self, forward_step):
        """The forward step, counted."""

        def counted(data_iterator, model):
            self._first_step = self._first_step or self.step
            self._count += 1
            return forward_step(data_iterator, model)

        return counted

    def __enter__(self) -> Watchdog:
        if self._store is not None:
            self._store.set_timeout(timedelta(seconds=30))
            # Now, not after the thread's first pause: a rank that hangs in between has reported.
            self._report(0, "")
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._interval())

    @property
    def step(self) -> int:
        """The step the rank is in, counted from 1."""
        return getattr(self._args, "curr_iteration", 0) + 1

    def tell(self) -> bool:
        """Note that this rank says why the training ends; False where another has done so."""
        if self._store is None:
            return True
        try:
            return self._store.add(_FAULT, 1) == 1
        except RuntimeError:  # the store's host is gone
            return True

    def _timeout(self, *, started: bool) -> float:
        """Seconds after which a collective gives up; a shorter time may hold from the second step on."""
        later = self._args.distributed_timeout_seconds_after_init
        seconds = 60.0 * self._args.distributed_timeout_minutes
        return min(seconds, later) if later is not None and started else seconds

    def _patience(self) -> float:
        """Seconds without movement before a line is printed. Starting slowly is not hanging: the first step of a
        training has the longer time, as Megatron gives it to its collectives."""
        return self._timeout(started=0 < self._first_step < self.step) / 3

    def _interval(self) -> float:
        return min(10.0, self._timeout(started=True) / 15)

    def _watch(self) -> None:
        beat, seen, since = 0, -1, time.monotonic()
        first: list[Report | None] | None = None
        first_beat = 0
        # The last rank waits a little longer: it speaks only where the first one does not.
        turn = {0: 0, self._world_size - 1: 4}.get(self._rank)
        try:
            while not self._ended.wait(self._interval()):
                beat += 1
                if self._count != seen:
                    seen, since, first = self._count, time.monotonic(), None
                still = time.monotonic() - since
                place = self._place() if still > self._patience() / 2 else ""
                self._report(beat, place)
                if turn is None or still < self._patience() + turn * self._interval():
                    continue
                if first is None:
                    first, first_beat = self._read(), beat
                elif beat == first_beat + 3 and self._store.add(f"told-{self.step}-{min(self._count, 1)}", 1) == 1:
                    _log.warning(who_waits(first, self._read(), self.step, still), extra=ANY_RANK)
        except RuntimeError:
            # The store is gone, and with it the rank or the launcher that hosts it: the training is ending.
            return

    def _report(self, beat: int, place: str) -> None:
        report = Report(beat, self._count, self.step, self._host, place)
        self._store.set(f"at-{self._rank}", json.dumps(asdict(report)))

    def _read(self) -> list[Report | None]:
        keys = [f"at-{rank}" for rank in range(self._world_size)]
        if not self._store.check(keys):
            keys = [key for key in keys if self._store.check([key])]
        found = dict(zip(keys, self._store.multi_get(keys), strict=True))
        reports = (found.get(f"at-{rank}") for rank in range(self._world_size))
        return [report and Report(**json.loads(report)) for report in reports]

    def _place(self) -> str:
        """Where the main thread is, from its Python frames."""
        frame = innermost = sys._current_frames().get(self._main)
        while frame is not None:
            if frame.f_code.co_name == _READING:
                return "reading its data"
            frame = frame.f_back
        if innermost is None:
            return ""
        if any(part in innermost.f_code.co_filename for part in _WAITING):
            return "waiting for others"
        return f"{Path(innermost.f_code.co_filename).name}:{innermost.f_lineno} ({innermost.f_code.co_name})"


def who_waits(first: list[Report | None], second: list[Report | None], step: int, still: float) -> str:
    """One line that names the ranks that keep the others waiting, from two readings of all reports, in rank order.

    In this order: ranks that report no more (stopped, or their host is gone), ranks in an earlier step, ranks that read
    data, ranks that do anything but wait. Where these are all ranks or none, it says where they are.
    """
    silent = [r for r, (a, b) in enumerate(zip(first, second, strict=True)) if b is None or (a and a.beat == b.beat)]
    known = [report for report in second if report is not None]
    newest = max((report.step for report in known), default=step)
    groups = {
        "is not running (stopped, or its host is gone)": silent,
        "is in an earlier step": [r for r, report in enumerate(second) if report and report.step < newest],
        "is reading its data": [r for r, report in enumerate(second) if report and report.place == "reading its data"],
        "does not wait": [r for r, report in enumerate(second) if report and report.place != "waiting for others"],
    }
    for what, ranks in groups.items():
        if 0 < len(ranks) < len(second):
            named = ", ".join(_describe(rank, second[rank], what) for rank in ranks[:4])
            more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
            return f"step {step} has not moved for {still:.0f} s: the others wait for {named}{more}"
    places = Counter(report.place or "elsewhere" for report in known).most_common(4)
    where = ", ".join(f"{count} at {place}" for place, count in places)
    return f"step {step} has not moved for {still:.0f} s on any rank, and none stands out: {where}"


def _describe(rank: int, report: Report | None, what: str) -> str:
    if report is None:
        return f"rank {rank}, which has never reported"
    at = f", at {report.place}" if what == "does not wait" and report.place else ""
    return f"rank {rank} (host {report.host}, seen in step {report.step}), which {what}{at}"
