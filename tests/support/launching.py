"""Starting several ranks from a test, so that none of them outlives it."""

from __future__ import annotations

import ctypes
import multiprocessing.forkserver
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

REPOSITORY = Path(__file__).resolve().parents[2]
# A machine whose cores are kept busy by others, several times over, takes that much longer than the seconds that a test
# names for a launch. Only a hang waits for the end of it.
BUSY = 4.0
GRACE_SECONDS = 10.0
_LIBC = ctypes.CDLL(None)
# In the environment of every process that the tests start, and so of each that one of these starts: whose it is stays
# known when its parent is gone.
_SESSION, _LAUNCH = "QTARGET_TEST_SESSION", "QTARGET_TEST_LAUNCH"


def begin_session() -> None:
    """From here on, what this process starts is known by its environment."""
    os.environ[_SESSION] = uuid.uuid4().hex


def left_behind() -> list[str]:
    """Ends the processes of this session that still run after a while; the command line of each.

    Those that multiprocessing keeps for the next launch are no part of it.
    """
    end = time.monotonic() + GRACE_SECONDS
    # A process that has just started its program has no environment for a moment.
    time.sleep(0.05)
    while (found := _marked(_SESSION, os.environ[_SESSION])) and time.monotonic() < end:
        time.sleep(0.1)
    return _end(found)


def _marked(name: str, value: str) -> list[psutil.Process]:
    """The running processes that have an environment variable; not this one, nor multiprocessing's own."""
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    own = {os.getpid(), server, resource_tracker._resource_tracker._pid}
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid not in own and process.environ().get(name) == value:
                found.append(process)
        except psutil.Error:  # of another user, a zombie, or ended a moment ago
            continue
    return found


def _end(processes: list[psutil.Process]) -> list[str]:
    """Kill by id; the command lines."""
    lines = []
    for process in processes:
        try:
            lines.append(f"{process.pid}: {' '.join(process.cmdline())[:300]}")
            process.kill()  # does nothing where the id has been reused since
        except psutil.Error:
            continue
    psutil.wait_procs(processes, timeout=GRACE_SECONDS)
    return lines


def free_port() -> int:
    """A TCP port of the loopback interface that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    args: Sequence = (),
    timeout: float = 120.0,
    *,
    megatron: bool = False,
) -> list[Any]:
    """Call ``function(*args)`` in world_size processes joined by gloo; the results, in rank order.

    function and args are pickled, so function is a module-level one. It finds the default process
    group initialised, and RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set.
    megatron: Megatron is imported already, and the CPU platform active where there is no GPU.
    timeout: seconds on an idle machine.

    Raises RuntimeError with the traceback of the first rank that fails, TimeoutError after BUSY times timeout
    seconds. No rank is left running in any case, nor anything that one which failed has started.
    """
    timeout *= BUSY
    mark = uuid.uuid4().hex
    context = _forking_context() if megatron else multiprocessing.get_context("spawn")
    environment = {**os.environ, _LAUNCH: mark}
    # Held here, on a port the store finds itself: no rank can lose a race for it.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, connections = [], []
    try:
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main,
                args=(rank, world_size, store.port, timeout, sender, function, tuple(args), environment),
                # Not a daemon: Megatron's checkpoint saving starts processes of its own.
            )
            process.start()
            sender.close()
            processes.append(process)
            connections.append(receiver)
        return _collect(connections, time.monotonic() + timeout, timeout)
    finally:
        failed = sys.exc_info()[0] is not None
        for process in processes:
            process.join(0 if failed else BUSY * GRACE_SECONDS)
            if process.is_alive():
                _end_descendants(process.pid)
                process.kill()
                process.join()
        if failed:
            # Helpers of a rank that died: nobody else knows them.
            _end(_marked(_LAUNCH, mark))


def _forking_context() -> multiprocessing.context.BaseContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["megatron_preload"])
    saved = dict(os.environ)
    folders = [str(REPOSITORY / "tests/support"), str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(saved)
    return context


def _collect(connections: list[Connection], deadline: float, timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = [c for rank, c in enumerate(connections) if rank not in results]
        ready = wait(waiting, max(deadline - time.monotonic(), 0))
        if not ready:
            missing = [rank for rank in range(len(connections)) if rank not in results]
            raise TimeoutError(f"rank(s) {missing} did not finish within {timeout} s")
        for connection in ready:
            rank = connections.index(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                raise RuntimeError(f"rank {rank} ended without a result") from None
            if not succeeded:
                others = {c: other for other, c in enumerate(connections) if other not in (*results, rank)}
                # A rank that waited for one that is gone may be heard before that one.
                raise RuntimeError("\n".join([*_heard(others), f"rank {rank} failed:\n{value}"]))
            results[rank] = value
    return [results[rank] for rank in range(len(connections))]


def _heard(connections: dict[Connection, int], seconds: float = 1.0) -> list[str]:
    """How these ranks end that fail within a moment."""
    end, waiting, found = time.monotonic() + seconds, dict(connections), []
    while waiting and (ready := wait(list(waiting), max(end - time.monotonic(), 0))):
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                succeeded, value = connection.recv()
            except EOFError:
                found.append(f"rank {rank} ended without a result")
            else:
                found += [] if succeeded else [f"rank {rank} failed:\n{value}"]
    return found


def _rank_main(
    rank: int,
    world_size: int,
    port: int,
    timeout: float,
    sender: Connection,
    function: Callable[..., Any],
    args: tuple,
    environment: dict[str, str],
) -> None:
    os.environ.clear()  # a forked rank has that of the day its server was started
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        # The store runs in the parent: every rank is a client of it.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
        result = function(*args)
        dist.barrier()
    except BaseException:
        sender.send((False, traceback.format_exc()))
        raise SystemExit(1) from None
    sender.send((True, result))
    dist.destroy_process_group()


def _end_with_this_process() -> None:
    # In the launcher, before it begins: a test run that is killed ends nothing itself. torchrun ends its ranks.
    _LIBC.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _end_with_parent() -> None:
    # A rank that waits in a collective does not notice that the test run was killed.
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def run_alone(
    module_args: Sequence[str],
    timeout: float,
    folder: Path,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run ``python -m <module_args>`` in folder as one process, without any variable that a launcher sets but env's.

    It is forked where Megatron is imported already. The result's stdout holds both streams. Raises TimeoutError with
    the end of the output after timeout seconds.
    """
    words = [str(word) for word in module_args]
    environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHERS} | dict(env or {})
    with tempfile.NamedTemporaryFile() as output:
        process = _forking_context().Process(target=_alone, args=(words, str(folder), output.name, environment))
        process.start()
        try:
            process.join(timeout)
            if process.exitcode is None:
                raise TimeoutError(f"{words} ran for more than {timeout} s:\n{_text(output)[-4000:]}")
        finally:
            if process.is_alive():
                _end_descendants(process.pid)
                process.kill()
                process.join()
        return subprocess.CompletedProcess(words, process.exitcode, stdout=_text(output))


_LAUNCHERS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"}


def _text(file) -> str:
    return Path(file.name).read_text(errors="replace")


def _alone(words: list[str], folder: str, output: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.chdir(folder)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def run_torchrun(
    nproc: int,
    module_args: Sequence[str],
    timeout: float,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess:
    """Run ``torchrun --nproc-per-node nproc -m <module_args>`` from the repository root.

    module_args: the module and its arguments; env: added to this process's environment.
    The result's stdout holds the output of all ranks, both streams; a failure is its returncode.
    Raises TimeoutError with the end of the output after BUSY times timeout seconds, when every process
    that it started has been ended.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(nproc), "-m", *map(str, module_args)]
    with Launch(command, env) as launch:
        return launch.wait(timeout)


class Launch:
    """A command that starts ranks, running in folder; none of its processes outlives the context.

    env: added to this process's environment.
    """

    def __init__(self, command: Sequence[str], env: Mapping[str, str] | None = None, folder: Path = REPOSITORY):
        self._folder = folder
        self.command = [str(word) for word in command]
        self._mark = uuid.uuid4().hex
        self._env = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **os.environ, **(env or {})}
        self._env[_LAUNCH] = self._mark

    def __enter__(self) -> Launch:
        # A file, not a pipe: a process that escaped could hold a pipe open for ever.
        self._output = tempfile.TemporaryFile()  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            cwd=self._folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_this_process,
        )
        return self

    def __exit__(self, *exception) -> None:
        self.kill()
        self._output.close()

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """The result, whose stdout holds the output of all ranks, both streams.

        Raises TimeoutError with the end of the output after BUSY times timeout seconds, timeout on an idle machine.
        """
        timeout *= BUSY
        try:
            returncode = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            tail = self.output()[-4000:]
            raise TimeoutError(f"{self.command} ran for more than {timeout} s:\n{tail}") from None
        return subprocess.CompletedProcess(self.command, returncode, stdout=self.output())

    def output(self) -> str:
        """What it has printed so far."""
        return os.pread(self._output.fileno(), os.fstat(self._output.fileno()).st_size, 0).decode(errors="replace")

    def processes(self) -> list[psutil.Process]:
        """Those of this launch that still run, whoever is their parent now."""
        return _marked(_LAUNCH, self._mark)

    def assert_nothing_left(self) -> None:
        """Nothing that was started by the launch runs on, once its end has had time to spread."""
        deadline = time.monotonic() + BUSY * GRACE_SECONDS
        while left := self.processes():
            assert time.monotonic() < deadline, [" ".join(process.cmdline())[:200] for process in left]
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL to the launcher where it still runs; nothing of one that failed is left.

        torchrun gives each rank a process group of its own.
        """
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self.process.returncode != 0:
            _end(_marked(_LAUNCH, self._mark))


def _end_descendants(pid: int) -> None:
    try:
        _end(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:  # it ended by itself a moment ago
        return
