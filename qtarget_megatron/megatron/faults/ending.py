"""How the process of a command ends: its exit code, its last line, the cause for the launcher, and nothing left behind.

    0      all work is done, or Megatron's --exit-interval or --exit-duration-in-mins has ended it as asked
    1      a fault, or a comparison that found a difference
    2      bad input
    130    Ctrl-C (SIGINT); 129 for SIGHUP, of a terminal that is closed
    143    SIGTERM, after the step has been finished and saved; 128 + N for --exit-signal N

torchrun itself exits with 1 where any rank does not with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil
import torch.distributed as dist

from qtarget_megatron import output_lock
from qtarget_megatron.command_line import record_cause
from qtarget_megatron.megatron.faults.explained import EndedEarly, Fault
from qtarget_megatron.megatron.faults.limits import what_ran_out
from qtarget_megatron.megatron.faults.resume_point import advice, newest_iteration
from qtarget_megatron.megatron.faults.watchdog import Watchdog
from qtarget_megatron.megatron.runtime import launch, logs

_INTERRUPTS = {int(signal.SIGINT): "Ctrl-C (SIGINT)", int(signal.SIGHUP): "SIGHUP"}
# What a line about an end says beyond its reason.
_describe: Callable[[], str] | None = None
_interrupted = threading.Event()


def run(name: str, main: Callable[[], int], *, at_once: Collection[int] = ()) -> NoReturn:
    """Be the process of a command: main() returns its exit code. Only for ``if __name__ == "__main__"``.

    at_once: exit codes with which ranks are out of step, so that process groups cannot be closed in order.

    Ctrl-C is one line from one rank of a host; an error that nobody explains keeps its traceback, with one line after
    it. A rank of torchrun ends when torchrun has been killed.
    """
    faulthandler.enable()
    logs.quiet(sys.argv[1:])
    _end_with_launcher(name)
    _end_on_interrupt(name)
    try:
        code = main()
    except SystemExit as stop:  # --help
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException as error:
        _give_way()
        trace = traceback.format_exc()
        line = f"{name}: error on rank {_rank()}: {_in_a_line(error)}"
        record_cause(line, f"{trace}{line}")
        sys.stdout.flush()
        print(f"{trace}{line}", file=sys.stderr, flush=True)
        launch.leave_at_once(1)
    # Bad input may be that of one rank.
    if code == 2 or _failed or code in at_once:
        launch.leave_at_once(code)
    if dist.is_initialized():
        dist.destroy_process_group()
    sys.exit(code)


_failed = False


def told(name: str, error: BaseException) -> int | None:
    """The exit code for an error that a line explains, which is then printed and recorded; None for any other."""
    global _failed
    _give_way()
    if isinstance(error, EndedEarly):
        line = f"{name}: {error}"
        if error.code != 0:
            record_cause(line)
        if _rank() == 0:
            sys.stdout.flush()
            print(line, file=sys.stdout if error.code == 0 else sys.stderr, flush=True)
        return error.code
    if isinstance(error, Fault):
        line = f"{name}: error on rank {_rank()}: {error}"
        record_cause(line)
        if not error.already_reported:
            print(line, file=sys.stderr, flush=True)
        _failed = True
        return 1
    if isinstance(error, ValueError) and launch.is_bad_input(error):
        print_error(name, str(error))
        return 2
    if isinstance(error, OSError | MemoryError | RuntimeError) and (what := what_ran_out(error)) is not None:
        line = f"{name}: error on rank {_rank()}: {what}"
        record_cause(line)
        print(line, file=sys.stderr, flush=True)
        _failed = True
        return 1
    return None


def print_error(name: str, message: str) -> None:
    """One line on stderr from the first rank. Another rank speaks up only if it is still there a moment later: where
    all fail alike, the launcher has ended it by then."""
    rank = _rank()
    where = f" on rank {rank}" if rank != 0 else ""
    line = f"{name}: error{where}: {message}"
    record_cause(line)
    # Megatron's handler, where it is on already, would keep a rank that the launcher ends.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if rank != 0:
        time.sleep(5)
    print(line, file=sys.stderr, flush=True)


def early_end(args: argparse.Namespace, stop: SystemExit) -> EndedEarly | Fault:
    """What has made Megatron's pretrain() exit. Collective where its training loop did, as that does on all ranks."""
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if traceback.extract_tb(stop.__traceback__)[-1].name != "train":
        return Fault(f"Megatron has ended the program, for a reason that it has printed; {advice(args)}")
    step = args.curr_iteration + 1
    if code != 0:
        return Fault(f"Megatron has ended the training at {where(args, step)}, with exit code {code}")
    if args.exit_signal_handler and launch.exit_signal_received():
        number = signal.Signals(args.exit_signal)
        return EndedEarly(f"ended by {number.name} at {where(args, step)}", 128 + number)
    if args.exit_interval and step % args.exit_interval == 0:
        by = f"--exit-interval {args.exit_interval}"
    elif args.exit_duration_in_mins:
        by = f"--exit-duration-in-mins {args.exit_duration_in_mins}"
    else:
        by = "Megatron"
    return EndedEarly(f"ended by {by} at {where(args, step)}", 0)


def where(args: argparse.Namespace, step: int) -> str:
    """How far a training came, what is left of it, how it goes on: ``step 4 of 400, saved as iteration 4 in ...``."""
    words = [f"step {step} of {args.train_iters}" if args.train_iters else f"step {step}"]
    if args.save is not None and newest_iteration(args.save) == step:
        words[0] += f", saved as iteration {step} in {args.save}"
    if args.save_hf is not None:
        words.append(f"nothing was exported to {args.save_hf}")
    return "; ".join([*words, advice(args)])


@contextlib.contextmanager
def described(args: argparse.Namespace, watchdog: Watchdog) -> Iterator[None]:
    """While a training runs, Ctrl-C's line says how far it is."""
    global _describe
    _describe = lambda: where(args, watchdog.step)  # noqa: E731
    try:
        yield
    finally:
        _describe = None


def _rank() -> int:
    return _number("RANK", 0)


def _number(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdigit() else otherwise


def _speaks() -> bool:
    """One rank of a host: Ctrl-C may reach one host only."""
    return _number("LOCAL_RANK", _rank()) == 0


def _give_way() -> None:
    """Ctrl-C makes the other ranks' connections fail: its line is the one that counts, and it ends this process."""
    if _interrupted.is_set():
        time.sleep(60)


def _in_a_line(error: BaseException) -> str:
    said = next((line for line in str(error).splitlines() if line.strip()), "")
    notes = "; ".join(getattr(error, "__notes__", ()))
    return "; ".join(filter(None, [f"{type(error).__name__}: {said[:400]}".strip(": "), notes]))


# ---- Ctrl-C


def _end_on_interrupt(name: str) -> None:
    """Have Ctrl-C, and a terminal that is closed, end the process from a thread of its own: the main one may wait in a
    collective, where no Python code runs. A second signal half a second later or more does not wait for the line."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    first = threading.Lock()

    def end(number: int, frame: FrameType | None = None) -> None:
        if first.acquire(blocking=False):
            _interrupted.set()
            threading.Thread(target=_end_interrupted, args=(name, number), daemon=True).start()

    def watch() -> None:
        since = None
        while received := os.read(reading, 64):
            for number in received:
                # Not one that is Megatron's by --exit-signal.
                if number not in _INTERRUPTS or signal.getsignal(number) is not end:
                    continue
                if since is not None and time.monotonic() - since > 0.5:
                    os._exit(128 + number)
                since = since or time.monotonic()
                end(number)

    heeded = [number for number in _INTERRUPTS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in heeded:  # nohup, and a shell for what it starts in the background, have them ignored
        signal.signal(number, end)
    # Python's C handler writes there, whatever the main thread does.
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget_interrupts)
    threading.Thread(target=watch, name="interrupts", daemon=True).start()


def _forget_interrupts() -> None:
    """In a forked data worker: its rank ends it."""
    signal.set_wakeup_fd(-1)
    for number in _INTERRUPTS:
        signal.signal(number, signal.SIG_IGN)


def _end_interrupted(name: str, number: int) -> None:
    try:
        where = _describe() if _describe is not None else ""
    except Exception:
        where = ""
    line = f"{name}: ended by {_INTERRUPTS[number]}{where and f' at {where}'}"
    record_cause(line)
    if _speaks():
        start = "\n" if sys.stdout.isatty() else ""
        _write(f"{start}{line}")
    launch.kill_children()
    os._exit(128 + number)


def _write(line: str) -> None:
    """To stderr, not through sys.stderr: the main thread may be waiting there."""
    with contextlib.suppress(OSError):  # nobody reads it any more
        os.write(2, f"{line}\n".encode())


# ---- the launcher


def _end_with_launcher(name: str) -> None:
    """A rank whose torchrun was killed would train on, unseen and out of reach of a scheduler."""
    launcher = _launcher()
    if launcher is None:
        return

    def watch() -> None:
        while _is_alive(launcher):
            time.sleep(1)
        launch.kill_children()
        line = f"{name}: error on rank {_rank()}: torchrun (process {launcher.pid}) is gone: this rank ends too"
        if _speaks():
            _write(line)
        os._exit(1)

    threading.Thread(target=watch, name="end-with-launcher", daemon=True).start()


def _launcher() -> psutil.Process | None:
    """The torchrun that has started this rank, also through a script; None for a rank that something else has started.

    torchrun says to what it starts that it is its rank, and has not been told so itself.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    try:
        for parent in psutil.Process().parents():
            if "TORCHELASTIC_RUN_ID" not in parent.environ():
                return parent if _is_torchrun(parent) else None
    except psutil.Error:  # another user's process
        pass
    return None


def _is_torchrun(process: psutil.Process) -> bool:
    return any(
        Path(word).name == "torchrun" or "torch.distributed" in word or "torch/distributed" in word
        for word in process.cmdline()
    )


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def exit_code(name: str, command: Callable[[], int]) -> int:
    """What command() returns, or the code for an error that one line explains: 2 for bad input, 1 where something has
    run out (memory, files, ...). The package's log is printed meanwhile."""
    try:
        with logs.shown():
            return command()
    except Exception as error:
        code = told(name, error)
        if code is None:
            raise
        return code
    finally:
        output_lock.release_all()
