"""Time and memory of a piece of work: alternating runs, and what it allocates on top of what it is given."""

from __future__ import annotations

import ctypes
import gc
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_M_MMAP_THRESHOLD = -3  # of glibc's mallopt


@dataclass(frozen=True)
class Subject:
    """run() is measured; prepare() comes before each run and is not. What run() returns is alive until it is over."""

    run: Callable[[], Any]
    prepare: Callable[[], None] = lambda: None


def alternate(
    subjects: Mapping[str, Subject],
    *,
    device: torch.device,
    seconds: float,
    min_rounds: int,
    max_rounds: int = 25,
) -> dict[str, list[float]]:
    """Seconds of each run of each subject, taken in turn (A B C A B C ...), so that a slow moment meets them all.

    There are at least min_rounds rounds, and more until ``seconds`` have passed, at most max_rounds. The subjects have
    run before: nothing is left out here.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    started = time.monotonic()
    gc.collect()
    gc.disable()
    try:
        for number in range(max_rounds):
            if number >= min_rounds and time.monotonic() - started >= seconds:
                break
            for name, subject in subjects.items():
                subject.prepare()
                times[name].append(_timed(subject.run, device))
    finally:
        gc.enable()
    return times


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        result = run()
        end.record()
        torch.cuda.synchronize(device)
        elapsed = start.elapsed_time(end) / 1000
    else:
        start = time.perf_counter()
        result = run()
        elapsed = time.perf_counter() - start
    # Freeing the result belongs to its user, not to the work.
    del result
    return elapsed


@dataclass(frozen=True)
class Memory:
    """Bytes of one run.

    peak:     the most of torch's allocator that was alive at once, of what the run allocated.
    kept:     of that, alive at its end: its results.
    resident: growth of the process's resident memory at its peak, whoever allocated it; None where Linux does not tell.
    """

    peak: int
    kept: int
    resident: int | None = None

    @property
    def extra(self) -> int:
        """Bytes of the allocator beyond inputs and results."""
        return self.peak - self.kept


def memory(subject: Subject, device: torch.device) -> tuple[Memory, Any]:
    """The memory of one run, and its result.

    The allocator's figures are exact: it records every allocation and release itself (on the CPU through torch's
    profiler), those inside of compiled code too. They do not show what a library takes from the system by itself;
    resident memory does, to a few MiB, and with the profiler's own events in it, some 350 bytes each. Memory that was
    freed before goes back to the system first: the run may not find it resident.
    """
    subject.prepare()
    _return_freed_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = subject.run()
        torch.cuda.synchronize(device)
        peak, kept = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return Memory(peak - before, kept - before), result
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        before = _reset_resident_peak()
        result = subject.run()
        resident = None if before is None else max(_status("VmHWM") - before, 0)
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return Memory(peak, alive, resident), result


def resident(run: Callable[[], Any]) -> tuple[float, int | None]:
    """Seconds of one run, and the growth of the process's resident memory at its peak; None where Linux does not tell.

    Memory that was freed before goes back to the system first, and during the run where it is 1 MiB or more, if
    return_large_blocks() was called when the process began; so that what the C library keeps for later is not mistaken
    for what the run needs.
    """
    return_large_blocks()
    _return_freed_memory()
    before = _reset_resident_peak()
    started = time.perf_counter()
    result = run()
    taken = time.perf_counter() - started
    grown = None if before is None else max(_status("VmHWM") - before, 0)
    del result
    return taken, grown


def return_large_blocks() -> None:
    """Let blocks of 1 MiB or more go back to the system as soon as they are freed, from now on (glibc).

    glibc raises this limit with each larger block that is freed; the blocks below it come from its heap, and stay
    there. A later call does not empty the heap: what was freed in it is given out first, whatever the size.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 20)


def _return_freed_memory() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _reset_resident_peak() -> int | None:
    """Let the peak start again from what is resident now, and return that; None where Linux does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _status("VmRSS")


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")
