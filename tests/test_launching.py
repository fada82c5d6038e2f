"""The launch helpers themselves: failures are reported, and no process outlives a launch."""

import os
import sys
import time
from multiprocessing.forkserver import _forkserver as forkserver

import psutil
import pytest
import torch
import torch.distributed as dist
from launching import Launch, run_ranks, run_torchrun

pytestmark = pytest.mark.distributed


def behave(how):
    """Rank 1 does what is asked; rank 0 waits for it in a collective."""
    if dist.get_rank() == 1 and how == "raise":
        raise ValueError("rank 1 has had enough")
    if dist.get_rank() == 1 and how == "exit":
        os._exit(3)
    if dist.get_rank() == 1 and how == "hang":
        time.sleep(300)
    total = torch.ones(1)
    dist.all_reduce(total)
    loaded = "megatron.training" in sys.modules
    return dist.get_rank(), total.item(), os.environ["RANK"], os.environ["WORLD_SIZE"], loaded


def children():
    # The tracker of shared resources is multiprocessing's own, and stays; so does the server that forks ranks.
    found = [child for child in psutil.Process().children(recursive=True) if child.pid != forkserver._forkserver_pid]
    names = [child.cmdline() for child in found]
    return [name for name in names if "resource_tracker" not in " ".join(name)]


@pytest.mark.parametrize("megatron", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_results_come_in_rank_order(megatron):
    results = run_ranks(2, behave, ["return"], megatron=megatron)
    assert results == [(0, 2.0, "0", "2", megatron), (1, 2.0, "1", "2", megatron)]
    assert not children()


@pytest.mark.parametrize(
    ("how", "timeout", "megatron", "error", "message"),
    [
        ("raise", 60, False, RuntimeError, "rank 1 failed:(.|\n)*ValueError: rank 1 has had enough"),
        ("exit", 60, False, RuntimeError, "rank 1 ended without a result"),
        ("hang", 8, False, TimeoutError, r"rank\(s\) \[0, 1\] did not finish within 8 s"),
        pytest.param("hang", 30, True, TimeoutError, "did not finish within 30 s", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_is_named_and_ends_the_others(how, timeout, megatron, error, message):
    started = time.monotonic()
    with pytest.raises(error, match=message):
        run_ranks(2, behave, [how], timeout, megatron=megatron)
    assert time.monotonic() - started < timeout + 50
    assert not children()


WORKER = """
import os, sys, time
rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
# One write each: the ranks share the file.
os.write(1, f"rank {rank} of {size} {sys.argv[1:]}\\n".encode())
os.write(2, f"pid {os.getpid()}\\n".encode())
if sys.argv[1] == "hang":
    time.sleep(300)
sys.exit(int(os.environ["STATUS"]))
"""


@pytest.fixture
def worker(tmp_path):
    (tmp_path / "worker_of_a_test.py").write_text(WORKER)
    return {"PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("status", [0, 7])
def test_torchrun_returns_the_output_of_all_ranks(worker, status):
    result = run_torchrun(2, ["worker_of_a_test", "work", "1"], 100, {**worker, "STATUS": str(status)})
    assert (result.returncode == 0) == (status == 0)
    # torchrun ends the other rank as soon as one has failed, maybe before it has said anything.
    seen = [f"rank {rank} of 2 ['work', '1']" in result.stdout for rank in (0, 1)]
    assert any(seen) if status else all(seen)
    assert "pid" in result.stdout, "standard error belongs to the output"


@pytest.mark.slow
def test_a_launch_leaves_no_rank_behind_on_timeout(worker):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    with Launch([*command, "-m", "worker_of_a_test", "hang"], worker) as launch:
        deadline = time.monotonic() + 100
        while len(pids := [int(line.split()[1]) for line in launch.output().splitlines() if line[:3] == "pid"]) < 2:
            assert time.monotonic() < deadline, launch.output()
            time.sleep(0.1)
        with pytest.raises(TimeoutError, match="ran for more than 0.5 s:(.|\n)*rank 0 of 2"):
            launch.wait(0.5)
        for pid in pids:
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
