"""Start the training ranks, follow what they print, measure their memory and end them surely."""

import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

GRACE_SECONDS = 10
TAIL_LINES = 25
# torchrun's remarks on a failed rank; the reason stands before them.
LAUNCHER_REMARK = "torch/distributed/elastic/"


class LaunchFailed(Exception):
    """The launched program ended with an error; the message carries the end of its log."""


@dataclass
class MemoryPeaks:
    """Peak memory in bytes.

    per_rank: resident memory of each rank's process. together: proportional memory of all processes
    at one moment (pages that several share are counted once); 0 where the system does not tell.
    """

    per_rank: dict[int, int] = field(default_factory=dict)
    together: int = 0


def launch(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    log: Path,
    on_line: Callable[[str], None],
    sample_seconds: float = 1.0,
) -> MemoryPeaks:
    """Run `command` to its end, its output written to `log` and handed line by line to `on_line`.

    Whatever ends this function early (Ctrl-C, an error in `on_line`, SIGTERM under
    `sigterm_as_interrupt`) first ends every process it started, each by its id.

    Raises:
        LaunchFailed: the program could not be started or returned another status than 0.
    """
    tail: deque[str] = deque(maxlen=TAIL_LINES)
    remarked = False
    with log.open("w", encoding="utf-8") as file:
        # Its own session: Ctrl-C reaches this process only, which then ends the others in order.
        process = subprocess.Popen(
            command,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        watcher = MemoryWatcher(process.pid, sample_seconds)
        try:
            watcher.start()
            for line in process.stdout:
                file.write(line)
                file.flush()
                remarked = remarked or LAUNCHER_REMARK in line
                if not remarked:
                    tail.append(line)
                on_line(line.rstrip("\n"))
            status = process.wait()
        finally:
            watcher.stop()
            end_processes(process, watcher.seen)
            process.stdout.close()
    if status != 0:
        raise LaunchFailed(
            f"the training processes ended with status {status}; the end of their log:\n"
            + "".join(f"  | {line}" for line in tail).rstrip()
        )
    return watcher.peaks


@contextmanager
def sigterm_as_interrupt():
    """Let SIGTERM raise KeyboardInterrupt inside the block, so that it cleans up like Ctrl-C.

    For the main thread: Python allows signal handlers nowhere else.
    """

    def interrupt(signum, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_processes(process: subprocess.Popen, known: Sequence[psutil.Process] = ()) -> None:
    """End `process`, its descendants and the `known` ones that still run: politely, then surely."""
    alive = {child for child in known if child.is_running()}
    try:
        parent = psutil.Process(process.pid)
        alive |= {parent, *parent.children(recursive=True)}
    except psutil.NoSuchProcess:
        pass
    for victim in alive:
        try:
            victim.terminate()
        except psutil.NoSuchProcess:
            pass
    _, stubborn = psutil.wait_procs(alive, timeout=GRACE_SECONDS)
    for victim in stubborn:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(stubborn, timeout=GRACE_SECONDS)
    process.wait()


class MemoryWatcher:
    """Samples the memory of a process' descendants, its direct children by their RANK."""

    def __init__(self, pid: int, sample_seconds: float):
        self.peaks = MemoryPeaks()
        self._ranks: dict[psutil.Process, int | None] = {}
        self._root = psutil.Process(pid)
        self._seconds = sample_seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def seen(self) -> list[psutil.Process]:
        """Every descendant seen so far; one whose parent died is remembered here alone."""
        return list(self._ranks)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.is_set():
            started = time.monotonic()
            try:
                self._sample()
            except psutil.NoSuchProcess:
                return  # The launcher itself has ended: nothing more to measure.
            # Proportional memory is slow to read: spend at most a fiftieth of the time on it.
            spent = time.monotonic() - started
            self._stopped.wait(max(self._seconds, 50 * spent))

    def _sample(self) -> None:
        direct = set(self._root.children())
        together = 0
        for child in self._root.children(recursive=True):
            try:
                rank = self._ranks.setdefault(child, None)
                if rank is None and child in direct:
                    # Asked again until it answers: a process just forked has its parent's environment still.
                    word = child.environ().get("RANK")
                    rank = self._ranks[child] = int(word) if word is not None else None
                if rank is not None:
                    resident = child.memory_info().rss
                    self.peaks.per_rank[rank] = max(self.peaks.per_rank.get(rank, 0), resident)
                together += getattr(child.memory_full_info(), "pss", 0)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        self.peaks.together = max(self.peaks.together, together)
