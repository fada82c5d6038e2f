"""The launch helpers themselves: failures are reported, and no process outlives a launch."""

import os
import re
import signal
import subprocess
import sys
import time
from multiprocessing.forkserver import _forkserver as forkserver
from pathlib import Path

import launching
import psutil
import pytest
import torch
import torch.distributed as dist
from launching import REPOSITORY, Launch, left_behind, run_ranks, run_torchrun

pytestmark = pytest.mark.distributed


@pytest.fixture
def idle(monkeypatch):
    """Timeouts as they are given."""
    monkeypatch.setattr(launching, "BUSY", 1)


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
        pytest.param("hang", 8, True, TimeoutError, "did not finish within 8 s", marks=pytest.mark.slow),
    ],
)
def test_a_failing_rank_is_named_and_ends_the_others(idle, how, timeout, megatron, error, message):
    with pytest.raises(error, match=message):
        run_ranks(2, behave, [how], timeout, megatron=megatron)
    assert not children()


def leave_a_helper(path):
    """A process that nobody would end, of a rank that dies."""
    helper = subprocess.Popen(["sleep", "600"], start_new_session=True)
    Path(path).write_text(str(helper.pid))
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("megatron", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_killed_rank_had_started_is_ended(tmp_path, megatron):
    with pytest.raises(RuntimeError, match="rank 0 ended without a result"):
        run_ranks(1, leave_a_helper, [str(tmp_path / "pid")], megatron=megatron)
    assert is_gone(int((tmp_path / "pid").read_text()))


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_process_that_escaped_is_found_and_ended(monkeypatch):
    """Its parent is gone, its session is its own. One of another test run is left alone."""
    monkeypatch.setattr(launching, "GRACE_SECONDS", 1)
    started = "import subprocess as s; print(s.Popen(['sleep', '600'], start_new_session=True, stdout=s.DEVNULL).pid)"
    ours, other = (
        int(subprocess.check_output([sys.executable, "-c", started], env=os.environ | environment))
        for environment in ({}, {"QTARGET_TEST_SESSION": "another"})
    )
    try:
        (line,) = left_behind()
        assert line == f"{ours}: sleep 600" and is_gone(ours) and not is_gone(other)
    finally:
        psutil.Process(other).kill()


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
def test_a_launch_leaves_no_rank_behind_on_timeout(idle, worker):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    with Launch([*command, "-m", "worker_of_a_test", "hang"], worker) as launch:
        deadline = time.monotonic() + 400
        while len(pids := [int(line.split()[1]) for line in launch.output().splitlines() if line[:3] == "pid"]) < 2:
            assert time.monotonic() < deadline, launch.output()
            time.sleep(0.1)
        with pytest.raises(TimeoutError, match="ran for more than 0.5 s:(.|\n)*rank 0 of 2"):
            launch.wait(0.5)
        assert all(is_gone(pid) for pid in pids)


REPORTED = """
import pytest

@pytest.mark.cuda
@pytest.mark.parametrize("number", range(3))
def test_of_a_gpu(number):
    raise AssertionError("must not run")

@pytest.mark.skip(reason="of another kind")
def test_skipped(): ...

def test_that_leaves_a_process():
    import subprocess
    subprocess.Popen(["sleep", "601"], start_new_session=True)
"""


@pytest.mark.slow
def test_the_summary_names_what_needs_a_gpu_in_one_line_and_a_process_left_behind_fails(tmp_path):
    (tmp_path / "test_reported.py").write_text(REPORTED)
    (tmp_path / "test_more.py").write_text(REPORTED[: REPORTED.index("@pytest.mark.skip(")])
    (tmp_path / "impatient.py").write_text("import launching\nlaunching.GRACE_SECONDS = 1\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -ra\n")
    tests = REPOSITORY / "tests"
    folders = [str(tmp_path), str(tests), str(tests / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(folders), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "impatient", "-n", "2", "--dist", "loadfile"]
    command += [str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    summary = done.stdout[done.stdout.index("short test summary info") :].splitlines()[1:]
    (line,) = [line for line in summary if "GPU" in line]
    assert line.startswith("6 tests need an NVIDIA GPU (marker cuda) and were not run: ")
    assert line.endswith(": test_more.py (3), test_reported.py (3)")
    assert any(line.startswith("SKIPPED [1]") and line.endswith("of another kind") for line in summary)
    assert re.search(r"1 passed, 7 skipped.* 1 error", summary[-1]), summary
    assert re.search(r"have left processes behind, which are ended now:\n(E +)?\d+: sleep 601", done.stdout)
