"""make gpu without a GPU: its driver with steps of this file's own, and its report."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time

import psutil
import pytest
import torch
from launching import REPOSITORY
from setup_script import make

from tools.benchmarking import machine
from tools.first_hour import driver
from tools.first_hour import report as gpu_report
from tools.first_hour.process import outcome
from tools.first_hour.steps import STEPS, Step

LIMIT = 4321.5
GPUS = driver.Gpus("NVIDIA H0, driver 1.2", 1, (9, 0))
WHERE = "NVIDIA H0, driver 1.2, torch 9"
COMMIT = {"commit": "c" * 40, "dirty": False}


def own(name, limit=100.0, **arguments):
    return Step(name, f"a step that {name}", f"gpu_steps:{name}", limit, arguments)


@pytest.fixture
def go(tmp_path, monkeypatch, capsys):
    """run(steps) -> (exit code, lines printed), with a state in a folder of its own."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "tests/support"))
    monkeypatch.setattr(machine, "repository", lambda: COMMIT)

    def run(*chosen, again=False):
        monkeypatch.setattr(driver, "STEPS", chosen)
        code = driver.run(chosen, GPUS, WHERE, tmp_path / "out", tmp_path / "GPU.md", again)
        return code, capsys.readouterr().out.splitlines()

    return run


def order(tmp_path):
    return (tmp_path / "out/steps/order").read_text().split()


def test_a_failing_step_does_not_stop_the_next_and_what_has_passed_is_not_run_again(go, tmp_path, monkeypatch):
    chosen = [own("fails"), own("is_not_run"), own("dies"), own("passes", value=7)]
    code, lines = go(*chosen)
    assert code == 1 and len(lines) == 9  # two a step
    assert lines[0] == "gpu  1/4 fails: a step that fails (at most 100 s)"
    log = tmp_path / "out/logs/01-fails.log"
    assert re.fullmatch(rf"gpu  1/4 fails: failed in \d+ s: it is wrong \({log}\)", lines[1])
    assert re.fullmatch(
        r"gpu  2/4 is_not_run: not run in \d+ s: No such package is not installed \(pip install it\)", lines[3]
    )
    assert "dies: failed" in lines[5] and "its process ended with status 3" in lines[5]
    assert re.fullmatch(r"gpu  4/4 passes: passed in \d+ s", lines[7])
    assert lines[8] == f"gpu: wrote {tmp_path / 'GPU.md'}"
    assert "its last words" in log.read_text() and "Failed: it is wrong" in log.read_text()
    assert (tmp_path / "out/logs/04-passes.log").read_text() == "its log\n"
    text = (tmp_path / "GPU.md").read_text()
    assert '- {"value": 7}, 1 GPU, (9, 0)' in text and "4 steps: 1 passed, 2 failed, 1 not run." in text

    # Of the same commit only what has not passed is run; of another one, of a changed tree, or on demand all of it.
    passing = own("passes", value=7)
    assert go(passing)[1][0].startswith("gpu  1/1 passes: has passed at this commit on ")
    assert order(tmp_path) == ["passes"]
    assert go(passing, again=True)[1][1].startswith("gpu  1/1 passes: passed")
    monkeypatch.setattr(machine, "repository", lambda: {"commit": "d" * 40, "dirty": False})
    assert go(passing)[1][1].startswith("gpu  1/1 passes: passed")
    monkeypatch.setattr(machine, "repository", lambda: {"commit": "d" * 40, "dirty": True})
    assert go(passing)[1][1].startswith("gpu  1/1 passes: passed")
    assert order(tmp_path) == ["passes"] * 4
    kept = json.loads((tmp_path / "out/state.json").read_text())["results"]
    assert set(kept) == {"fails", "is_not_run", "dies", "passes"} and kept["passes"]["dirty"]


def test_a_step_over_its_limit_is_ended_with_what_it_started(go, tmp_path, monkeypatch):
    started, wait = tmp_path / "out/steps/child", subprocess.Popen.wait

    def wait_until_it_hangs(process, timeout=None):
        """The limit is over when the step has started its child, however busy the machine is."""
        if timeout != LIMIT:
            return wait(process, timeout)
        while not (started.exists() and started.read_text()):
            time.sleep(0.02)
        raise subprocess.TimeoutExpired("", timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_until_it_hangs)
    code, lines = go(own("hangs", limit=LIMIT), own("passes"))
    assert code == 1 and "hangs: failed in" in lines[1] and f"it took more than {LIMIT} s and was ended" in lines[1]
    assert "passes: passed" in lines[3]
    child = int((tmp_path / "out/steps/child").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


# ---- the command


def test_without_a_gpu_it_says_so_in_a_line(tmp_path):
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    command = [sys.executable, str(REPOSITORY / "tools/gpu.py"), "--out", "out", "--report", "GPU.md"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400)
    assert (done.returncode, done.stdout) == (driver.NO_GPU, "") and driver.NO_GPU == 3
    assert re.fullmatch(r"gpu: torch \S+ finds no NVIDIA GPU here: no step was run\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("has_tool", [True, False])
def test_the_gpu_is_told_by_nvidia_smi_or_by_torch(monkeypatch, has_tool):
    def run(words, **options):
        if not has_tool:
            raise FileNotFoundError(words[0])
        return subprocess.CompletedProcess(words, 0, "NVIDIA H0, 1.2, 9.0\nNVIDIA H1, 1.2, 9.0\n")

    monkeypatch.setattr(driver.subprocess, "run", run)
    for name, value in dict(
        is_available=True, device_count=2, get_device_name="T", get_device_capability=(8, 6)
    ).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    found, version = driver.find_gpus()
    expected = driver.Gpus("NVIDIA H0, driver 1.2", 2, (9, 0))
    assert found == (expected if has_tool else driver.Gpus("T, driver unknown", 2, (8, 6)))
    assert version == torch.__version__


def test_make_gpu_runs_it_in_the_environment():
    done = make(REPOSITORY, "-n", "gpu", "GPU_ARGS=--only build")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ".venv/bin/python tools/gpu.py --only build"


def test_steps_are_listed_in_their_order_and_chosen_by_name(monkeypatch, tmp_path, capsys):
    assert driver.main(["--list"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == [step.name for step in STEPS] and len(set(listed)) == len(listed)
    parts = ("build", "cuda-tests", "memcheck", "objectives", "kernels", "finetune-te", "verify-nccl", "waits-sft")
    positions = [listed.index(name) for name in (*parts, "head", "te-llama2", "context-parallel")]
    assert positions == sorted(positions)
    assert driver.main(["--only", "build", "--only", "speed"]) == 2
    assert capsys.readouterr().err == "gpu: error: unknown step 'speed': --list names them\n"
    ran = []
    monkeypatch.setattr(driver, "find_gpus", lambda: (GPUS, "9"))
    monkeypatch.setattr(driver, "run", lambda chosen, gpus, where, *more: ran.append((chosen, where)) or 0)
    assert driver.main(["--only", "head", "--only", "build", "--out", str(tmp_path)]) == 0
    assert ([step.name for step in ran[0][0]], ran[0][1]) == (["build", "head"], WHERE)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as ended:
        driver.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for word in ("--only", "--list", "--again", "--out", "--report", "make gpu", "Exit code: 0", "3 there is no GPU"):
        assert word in text, word


# ---- the report


def test_the_report_says_verdicts_figures_and_what_is_of_another_commit():
    found = outcome("passed", figures=["- off by 1e-6"]) | COMMIT | {"on": WHERE, "date": "2030-01-02T03:04+00:00"}
    results = {
        "build": found | {"seconds": 61.4},
        "memcheck": found | outcome("not run", "no sanitizer | here\nmore") | {"seconds": 0.2},
        "racecheck": found | outcome("failed", "1 hazard") | {"seconds": 5.0, "dirty": True},
        "kernels": found | {"seconds": 9.0, "commit": "a" * 40, "on": "another", "date": "2029-01-01T00:00+00:00"},
    }
    about = {"GPU": WHERE, "commit": "c" * 40, "date": "2030-01-02T05:00+00:00"}
    text = gpu_report.markdown(STEPS, results, about)
    rows = dict(re.findall(r"^\| `(\S+)` \| (.*) \|$", text, re.MULTILINE))
    assert set(rows) == {step.name for step in STEPS}
    assert rows["build"] == "passed | 61 | "
    assert rows["memcheck"] == "not run | 0 | no sanitizer \\| here"
    assert rows["racecheck"] == f"failed | 5 | 1 hazard; at commit {'c' * 40}, with uncommitted changes"
    assert rows["kernels"] == f"passed | 9 | at commit {'a' * 40}; on another; on 2029-01-01"
    assert rows["fp8"] == "not run |  | not reached yet"
    assert f"{len(STEPS)} steps: 2 passed, 1 failed, {len(STEPS) - 3} not run." in text
    assert f"| GPU | {WHERE} |" in text
    assert "## build\n\nNvidia-smi, nvcc" in text and text.count("- off by 1e-6") == 2
