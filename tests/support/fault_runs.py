"""Fine-tuning runs that something happens to: ranks that kill or stop themselves, full disks, slow data."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from finetune_runs import scalars
from launching import run_ranks
from megatron_reset import reset


@dataclass(frozen=True)
class Signal:
    """A rank sends itself a signal once it is in a step, some seconds later."""

    rank: int
    step: int
    later: float
    number: int = signal.SIGKILL

    def begin(self) -> None:
        from megatron.training.global_vars import get_args

        def send():
            while True:
                with contextlib.suppress(AssertionError):  # not yet initialised
                    if getattr(get_args(), "curr_iteration", 0) + 1 >= self.step:
                        break
                time.sleep(0.002)
            time.sleep(self.later)
            os.kill(os.getpid(), self.number)

        threading.Thread(target=send, daemon=True).start()


@dataclass(frozen=True)
class AtOpen:
    """Something happens to a rank when it opens a file for writing, the number-th one whose path holds text.

    action: "kill", some seconds later, or "full": from then on no file can grow beyond limit bytes.
    """

    rank: int
    text: str
    number: int = 1
    later: float = 0.0
    action: str = "kill"
    limit: int = 0

    def begin(self) -> None:
        seen = 0

        def watch(event, args):
            nonlocal seen
            if event != "open" or not isinstance(args[0], str | os.PathLike) or self.text not in os.fspath(args[0]):
                return
            if args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                seen += 1
                if seen == self.number:
                    self._act()

        sys.addaudithook(watch)

    def _act(self) -> None:
        if self.action == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.RLIM_INFINITY))
        elif self.later:
            threading.Timer(self.later, os.kill, (os.getpid(), signal.SIGKILL)).start()
        else:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class SlowData:
    """A rank sleeps in the data of an item."""

    rank: int
    item: int

    def begin(self) -> None:
        from qtarget_megatron.data import RowDataset

        read = RowDataset.__getitem__

        def slow(dataset, item):
            if item >= self.item:
                time.sleep(1000)
            return read(dataset, item)

        RowDataset.__getitem__ = slow


@dataclass(frozen=True)
class OtherVersion:
    """A rank has another version of the package."""

    rank: int

    def begin(self) -> None:
        from qtarget_megatron.megatron.faults import same_start

        same_start.versions = lambda: "qtarget_megatron 0.0"


def run_with(words: list[str] | list[list[str]], folder: str, happening=None) -> dict:
    """finetune with words (of this rank, where there is a list for each) in a process group of ranks.

    A rank that ends early writes what it printed to a file and exits at once, as it does under a launcher."""
    from qtarget_megatron import finetune

    rank = dist.get_rank()
    if happening is not None and happening.rank == rank:
        happening.begin()
    mine = words[rank] if isinstance(words[0], list) else words
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            code = finetune.main(mine)
        except SystemExit as stop:
            code = stop.code
    if code == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(folder, f"ended-{rank}").write_text(printed.getvalue())
        os._exit(1)
    reset()
    return {"code": code, "printed": printed.getvalue(), "handled": callable(signal.getsignal(signal.SIGTERM))}


def run_many(cases: dict[str, tuple], folder: str) -> dict[str, dict]:
    """run_with for each case (words, happening), in one process group."""
    return {name: run_with(words, folder, happening) for name, (words, happening) in cases.items()}


def launch_many(cases: dict[str, tuple], folder, *, timeout=400.0) -> list[dict[str, dict]]:
    """Results of both ranks, in order, by case (words, happening); none of them may end early."""
    for ended in Path(folder).glob("ended-*"):
        ended.unlink()
    try:
        return run_ranks(2, run_many, (cases, str(folder)), timeout, megatron=True)
    except RuntimeError as error:
        told = [ended.read_text()[-3000:] for ended in Path(folder).glob("ended-*")]
        raise AssertionError("\n".join(told)) from error


def launch(words, folder) -> list[dict]:
    """Results of both ranks, in order, of one run, which must have ended well."""
    results = [result["run"] for result in launch_many({"run": (texts(words), None)}, folder)]
    for result in results:
        assert result["code"] in (0, None), result["printed"][-3000:]
    return results


def launch_to_its_end(words, folder, happening, *, speaker=0, timeout=200.0):
    """What rank speaker printed of a run on two ranks that one of them does not survive."""
    ended = Path(folder, f"ended-{speaker}")
    ended.unlink(missing_ok=True)
    # The first rank that is gone ends the launch.
    try:
        run_ranks(2, run_with, (texts(words), str(folder), happening), timeout, megatron=True)
    except RuntimeError as error:
        assert "ended without a result" in str(error), error
    else:
        raise AssertionError("nothing happened")
    return ended.read_text() if ended.exists() else ""


def texts(words):
    return [texts(word) if isinstance(word, list | tuple) else str(word) for word in words]


def error_lines(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith("finetune: error")]


TAGS = ("lm loss", "grad-norm", "trust", "p(y)", "entropy", "supervised tokens")


def curves(board: Path) -> dict[str, list[float]]:
    found = scalars(board)
    return {tag: found[tag] for tag in TAGS}
