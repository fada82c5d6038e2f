"""How far a long run is: a bar on a terminal, a line of the log now and then elsewhere; on the first rank."""

from __future__ import annotations

import sys
import time
from datetime import timedelta

from qtarget_megatron.megatron.runtime import logs

_LINE_SECONDS, _BAR_SECONDS = 5.0, 0.2
_BAR_WIDTH = 24


class Progress:
    """Says ``name: 3/8 samples, 2.1 samples/s, 0:00:02 left``; on a terminal a bar that is drawn over itself.

    name: a command or the package, and what it does: "export: writing". total: of what there is to do; done: of that,
    what an earlier run did. Counted in units, of which ``scale`` are shown as one: Progress(..., unit="GB", scale=1e9)
    takes bytes. Nothing is said in the first ``after`` seconds.
    """

    def __init__(
        self, name: str, total: int, done: int = 0, *, unit: str = "samples", scale: float = 1, after: float = 0
    ):
        self._name, self._total, self._first, self._done = name, total, done, done
        self._unit, self._scale = unit, scale
        self._after = after
        self._silent = not logs.is_first_rank()
        self._terminal = sys.stdout.isatty()
        self._start = time.monotonic()
        self._interval = _BAR_SECONDS if self._terminal else _LINE_SECONDS
        self._last = self._start - self._interval
        self._printed: int | None = None

    def add(self, count: int) -> None:
        """As much more is done."""
        self.report(self._done + count)

    def report(self, done: int) -> None:
        """So much is done by now."""
        self._done = done
        now = time.monotonic()
        if now - self._start < self._after:
            return
        if self._silent or self._printed == self._total or (now - self._last < self._interval and done < self._total):
            return
        self._printed, self._last = done, now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        left = timedelta(seconds=round((self._total - done) / rate)) if rate else "unknown time"
        line = f"{self._count(done)}/{self._count(self._total)} {self._unit}, {rate / self._scale:.3g} {self._unit}/s"
        if not self._terminal:
            begin, _, what = self._name.partition(": ")
            logs.of(begin).info("%s%s, %s left", f"{what}: " if what else "", line, left)
            return
        filled = round(_BAR_WIDTH * done / self._total) if self._total else _BAR_WIDTH
        bar = "#" * filled + "." * (_BAR_WIDTH - filled)
        # Erases what a longer line before it left behind.
        print(f"\r{self._name}: [{bar}] {line}, {left} left\x1b[K", end="", flush=True)
        if done >= self._total:
            print(flush=True)

    def _count(self, value: int) -> str:
        return f"{value}" if self._scale == 1 else f"{value / self._scale:.3g}"
