"""Measurements run in fresh processes, joined by gloo where they are several; none of them outlives a run."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

TAIL_LINES = 25
_GRACE_SECONDS = 10.0


class MeasurementFailed(Exception):
    """A measurement could not be finished; the message says why."""


def run(
    function: str,
    arguments: dict[str, Any],
    *,
    say: Callable[[str], None],
    threads: int = 1,
    ranks: int = 1,
    timeout: float,
) -> list[Any]:
    """Call a function in ``ranks`` fresh processes with ``threads`` threads each; the results, in rank order.

    function: "module:name", imported there only, so that the number of threads is set before torch is loaded. It gets
    the arguments (plain data) and ``say``, which hands a line of progress to ``say`` here; it finds the default process
    group initialised, one rank or several.

    Raises MeasurementFailed, with the end of what the process printed, where a rank fails or timeout seconds are over.
    """
    context = multiprocessing.get_context("spawn")
    processes, connections = [], []
    with tempfile.TemporaryDirectory(prefix="qtarget-benchmark-") as folder:
        try:
            for rank in range(ranks):
                receiver, sender = context.Pipe(duplex=False)
                process = context.Process(
                    target=_main, args=(function, arguments, rank, ranks, threads, folder, timeout, sender)
                )
                process.start()
                sender.close()
                processes.append(process)
                connections.append(receiver)
            results = _collect(connections, say, folder, timeout)
            for process in processes:
                process.join(_GRACE_SECONDS)
            return results
        finally:
            for process in processes:
                _end(process)


def output_of(
    command: Sequence[str], *, what: str, folder: Path, environment: Mapping[str, str], timeout: float, log: Path
) -> str:
    """What a command prints, which is added to the end of a log as it comes. It has ended afterwards, with what it
    started.

    Raises MeasurementFailed, with the end of what it printed, where it fails or timeout seconds are over.
    """
    with log.open("a+", errors="replace") as file:
        start = file.seek(0, os.SEEK_END)
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise MeasurementFailed(f"{what} took more than {timeout:.0f} s and was ended") from None
        finally:
            end_tree(process.pid)
            process.wait()
        file.seek(start)
        text = file.read()
    if status != 0:
        raise MeasurementFailed(f"{what} ended with status {status}; the end of its log:\n{end_of(text)}")
    return text


def end_of(text: str) -> str:
    """The last lines of an output, to be shown."""
    return "\n".join(f"  | {line}" for line in text.splitlines()[-TAIL_LINES:])


def end_tree(pid: int) -> None:
    """End a process, after all that it started, each by its id."""
    try:
        parent = psutil.Process(pid)
        victims = [*parent.children(recursive=True), parent]
    except psutil.NoSuchProcess:
        return
    for victim in victims:
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            pass
    psutil.wait_procs(victims, timeout=_GRACE_SECONDS)


def _end(process: multiprocessing.process.BaseProcess) -> None:
    if process.exitcode is None:
        end_tree(process.pid)
    process.join()


def _collect(connections: list[Connection], say: Callable[[str], None], folder: str, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    while len(results) < len(connections):
        missing = {connection: rank for rank, connection in enumerate(connections) if rank not in results}
        ready = wait(list(missing), max(deadline - time.monotonic(), 0))
        if not ready:
            raise MeasurementFailed(f"it took more than {timeout:.0f} s and was ended")
        for connection in ready:
            rank = missing[connection]
            try:
                kind, value = connection.recv()
            except EOFError:
                raise MeasurementFailed(f"its process {rank} died{_tail(folder, rank)}") from None
            if kind == "failed":
                raise MeasurementFailed(f"its process {rank} failed{_tail(folder, rank)}\n{value}")
            if kind == "said":
                say(value)
            else:
                results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _tail(folder: str, rank: int) -> str:
    text = Path(folder, f"{rank}.log").read_text(errors="replace")
    return f"; the end of its output:\n{end_of(text)}" if text else ""


def _main(
    function: str,
    arguments: dict[str, Any],
    rank: int,
    ranks: int,
    threads: int,
    folder: str,
    timeout: float,
    sender: Connection,
) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    log = os.open(Path(folder, f"{rank}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(OMP_NUM_THREADS=str(threads), KINETO_LOG_LEVEL="5", TORCHINDUCTOR_COMPILE_THREADS="1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(threads)
        # A file, not a port: there is none to lose a race for.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=ranks,
            timeout=timedelta(seconds=timeout),
        )
        module, _, name = function.partition(":")
        measured = getattr(importlib.import_module(module), name)(
            **arguments, say=lambda line: sender.send(("said", line)) if rank == 0 else None
        )
        dist.barrier()
    except BaseException:
        sender.send(("failed", traceback.format_exc()))
        raise SystemExit(1) from None
    sender.send(("done", measured))
    dist.destroy_process_group()


def _end_with_parent() -> None:
    # A process deep in a kernel, in a collective or waiting for another does not notice that the run was killed.
    wait([multiprocessing.parent_process().sentinel])
    end_tree(os.getpid())
