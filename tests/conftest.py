"""One thread per process, reproducible draws, nothing written next to the sources, and no process left behind."""

import os
import sys
from collections import Counter

# Before torch loads its OpenMP runtime. Ranks are processes: more threads would fight over cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulated_kernels
import hypothesis
import launching
import pytest
import torch

from qtarget_megatron.megatron.runtime import cpu_platform, logs

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# derandomize: the same examples on every run; no database folder; shared machines miss deadlines.
hypothesis.settings.register_profile("repo", derandomize=True, database=None, deadline=None)
hypothesis.settings.load_profile("repo")

launching.begin_session()
NO_GPU = "Skipped: needs an NVIDIA GPU"


@pytest.fixture(autouse=True, scope="session")
def own_cache_folder(tmp_path_factory):
    """What this package and datasets keep for the next start; processes that the tests start find it there too."""
    os.environ["QTARGET_CACHE_DIR"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def caches(tmp_path, monkeypatch):
    """The folder of all copies of data."""
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def printed_log(capsys):
    """capsys, where the package's log is printed as a command does it."""
    with logs.shown():
        yield capsys


@pytest.fixture(autouse=True)
def megatron_in_ranks_alone():
    """Megatron and the CPU platform stay where they are once on, and make the CPU a GPU for the tests that follow."""
    yield
    if "megatron.core" in sys.modules or cpu_platform.is_active():
        pytest.fail("a test has imported megatron in pytest's own process: run_ranks(1, function, megatron=True)")


@pytest.fixture(scope="session")
def emulated_module(tmp_path_factory):
    """The CUDA kernels on the CPU: built once, in the folder that pytest-xdist's workers have in common."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    return emulated_kernels.load(emulated_kernels.build(folder / "emulated-kernels"))


@pytest.fixture(scope="module", autouse=True)
def no_process_left_behind():
    """The first fixture of a file is the last one to end: whatever its tests started is gone by then."""
    yield
    if found := launching.left_behind():
        pytest.fail("tests of this file have left processes behind, which are ended now:\n" + "\n".join(found))


def pytest_collection_modifyitems(items):
    for item in items:
        # As launching does with the time of a launch: what a test names is for an idle machine.
        if mark := item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(launching.BUSY * mark.args[0]), append=False)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip(NO_GPU.removeprefix("Skipped: "))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter):
    """What needs a GPU is one line of the summary; all else that was skipped is listed with its reason."""
    skipped = terminalreporter.stats.get("skipped", [])
    gpu = [report for report in skipped if report.longrepr[2] == NO_GPU]
    terminalreporter.stats["skipped"] = [report for report in skipped if report not in gpu]
    result = yield
    terminalreporter.stats["skipped"] = skipped
    if gpu:
        files = Counter(report.nodeid.split("::")[0].split("/")[-1] for report in gpu)
        counts = ", ".join(f"{file} ({count})" for file, count in sorted(files.items()))
        terminalreporter.write_line(
            f"{len(gpu)} tests need an NVIDIA GPU (marker cuda) and were not run: {counts}", yellow=True
        )
    return result
