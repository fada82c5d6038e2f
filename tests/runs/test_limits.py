"""What ran out is named, with its remedy: each error is one that Python or torch itself raises at that limit."""

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from launching import REPOSITORY
from torch.distributed.checkpoint.api import CheckpointException

from qtarget_megatron.megatron.faults.explained import explained
from qtarget_megatron.megatron.faults.limits import what_ran_out

PROGRAM = """
import json, os, resource, sys, threading
import torch
from qtarget_megatron.megatron.faults.limits import what_ran_out

lines = {}

def meet(name, action):
    try:
        action()
    except BaseException as error:
        lines[name] = what_ran_out(error)

def limited(limit, value, name, action):
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (value, before[1]))
    meet(name, action)
    resource.setrlimit(limit, before)

meet("memory of torch", lambda: torch.empty(1 << 60))
meet("memory of Python", lambda: bytearray(1 << 60))
limited(resource.RLIMIT_FSIZE, 100, "shared memory", lambda: torch.zeros(100_000).share_memory_())
keep = []
limited(resource.RLIMIT_NOFILE, 64, "files", lambda: keep.extend(open("/dev/null") for _ in range(64)))
limited(resource.RLIMIT_NOFILE, 10, "files of shared memory", lambda: torch.zeros(10).share_memory_())
keep.clear()
with open(sys.argv[1], "wb", buffering=0) as file:
    limited(resource.RLIMIT_FSIZE, 10, "disk", lambda: [file.write(b"x" * 100) for _ in range(2)])
if os.getuid() == 0:
    os.setuid(65534)  # root is above this limit
resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
meet("threads", lambda: threading.Thread(target=print).start())
meet("processes", os.fork)
os.write(1, json.dumps(lines).encode())
"""
PIECES = {
    "memory of torch": ["the memory of this machine ran out", "can't allocate memory", "--micro-batch-size"],
    "memory of Python": ["the memory of this machine ran out", "--micro-batch-size"],
    "shared memory": ["shared memory ran out", "/dev/shm", "--num-workers 0"],
    "files": ["too many open files", "the limit is 64 a process", "ulimit -n"],
    "files of shared memory": ["too many open files", "ulimit -n"],
    "disk": ["could not be written: File too large"],
    "threads": ["no process or thread could be started", "ulimit -u"],
    "processes": ["no process or thread could be started", "ulimit -u"],
}


@pytest.fixture(scope="module")
def lines(tmp_path_factory):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path_factory.mktemp("limits") / "file")]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=100)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("name", PIECES)
def test_a_limit_that_is_met_is_named_with_its_remedy(lines, name):
    assert lines[name] is not None
    assert "\n" not in lines[name] and all(piece in lines[name] for piece in PIECES[name]), lines[name]


def test_memory_of_the_gpu(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB\nmore"
    for error in (torch.OutOfMemoryError(text), RuntimeError(text)):
        line = what_ran_out(error)
        assert "ran out on rank 3" in line and "2.00 GiB" in line and "--recompute-activations" in line, line
        assert "\n" not in line


@pytest.mark.parametrize(
    "name", ["EROFS", "EACCES", "EPERM", "ENOTDIR", "EISDIR", "ELOOP", "ENAMETOOLONG", "EIO", "ESTALE"]
)
def test_a_path_that_cannot_be_used_later_on(name):
    number = getattr(errno, name)
    error = OSError(number, os.strerror(number), "/x/y")
    assert what_ran_out(error) == f"/x/y could not be opened or written: {os.strerror(number)}"
    wrapped = RuntimeError("a save failed")
    wrapped.__cause__ = error
    assert what_ran_out(wrapped) == what_ran_out(error)


def test_what_is_none_of_these_keeps_its_traceback():
    for error in (
        RuntimeError("shape mismatch"),
        ValueError("--hf-model: too many open files"),
        KeyError("shm"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
    ):
        assert what_ran_out(error) is None


def test_the_cause_of_a_failed_save_stands_in_the_line():
    """As torch brings it from one rank to all."""
    args, watchdog = SimpleNamespace(save=None), SimpleNamespace(step=7, tell=lambda: True)
    for cause, words in (
        (OSError(errno.EROFS, "Read-only file system", "/x/y"), "/x/y could not be opened or written: Read-only"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero"),
    ):
        error = CheckpointException("write", {3: (cause, None)})
        line = str(explained(error, args, watchdog))
        assert line.startswith("step 7: a checkpoint could not be written on rank(s) 3 (") and words in line, line
