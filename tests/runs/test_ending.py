"""How a run ends: exit code, last line, what torch's launcher shows, and that nothing is left behind."""

import argparse
import contextlib
import io
import multiprocessing
import os
import re
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from finetune_runs import COMMON, write_data, write_models
from launching import Launch, run_ranks

from qtarget_megatron.command_line import Parser, record_cause
from qtarget_megatron.megatron.faults import ending
from qtarget_megatron.megatron.faults.explained import explained
from qtarget_megatron.megatron.runtime import launch, logs

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m"]
LONE = [sys.executable, "-m"]
# A shell lets what it starts in the background ignore Ctrl-C, and a test run may be there.
HEED = """
import os, signal, sys
for number in (signal.SIGINT, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
HEEDING = [sys.executable, "-c", HEED]
# A file of objectives is run on every rank. This one sleeps in each step, so that a run is still there to be ended; and
# it does to rank 1 what the environment says, when the other rank is about to wait for it.
OBJECTIVE = """
import os, signal, sys, time
from qtarget_megatron import objectives

seen = 0

@objectives.register("slow")
def slow():
    sft = objectives.published.sft()
    def evaluate(stats, inputs):
        global seen
        seen += 1
        time.sleep(0.02)
        if seen == 9 and os.environ.get("RANK") == "1":
            what = os.environ.get("HAPPENS", "")
            if what == "raise":
                raise RuntimeError("the objective has had enough\\nof it")
            if what == "exit":
                os._exit(7)
            if what == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        return sft.evaluate(stats, inputs)
    return type(sft)(evaluate, residuals=sft.residuals)
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ending")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    (folder / "slow.py").write_text(OBJECTIVE)
    return folder


def command(workspace, *more, steps=400):
    words = ["qtarget_megatron.finetune", *COMMON, "--hf-model", workspace / "untied", "--train-iters", steps]
    words += ["--sft-train", workspace / "train.jsonl", "--objective-file", workspace / "slow.py"]
    return [*words, "--objective", "slow", *more]


def wait_for(condition, launched, timeout=300):
    deadline = time.monotonic() + timeout
    while not condition():
        assert launched.process.poll() is None and time.monotonic() < deadline, launched.output()[-3000:]
        time.sleep(0.02)


def in_training(launched, step=2):
    return f"iteration {step:8d}/" in launched.output()


def said(output):
    return [line for line in output.splitlines() if line.startswith("finetune: ")]


# ---- signals


def test_a_run_ended_by_sigterm_is_no_success(workspace):
    words = command(workspace, "--save-hf", workspace / "out")
    with Launch([*LONE, *words]) as launched:
        wait_for(lambda: in_training(launched), launched)
        launched.process.send_signal(signal.SIGTERM)
        ended = launched.wait(timeout=120)
        launched.assert_nothing_left()
    assert ended.returncode == 143
    pattern = (
        r"finetune: ended by SIGTERM at step \d+ of 400; nothing was exported to .*/out; nothing was saved, as --save "
        "was not given"
    )
    assert re.fullmatch(pattern, ended.stdout.splitlines()[-1]), ended.stdout[-2000:]
    assert not (workspace / "out").exists()


@pytest.mark.parametrize(
    ("start", "number", "what"),
    [
        (LONE, signal.SIGINT, r"Ctrl-C \(SIGINT\)"),
        (TORCHRUN, signal.SIGINT, r"Ctrl-C \(SIGINT\)"),
        (LONE, signal.SIGHUP, "SIGHUP"),
    ],
)
def test_ctrl_c_and_a_closed_terminal_are_one_line(workspace, start, number, what):
    save = workspace / f"interrupted-{len(start)}-{number}"
    words = command(workspace, "--num-workers", 1, "--save", save, "--save-interval", 2)
    with Launch([*HEEDING, *start, *words]) as launched:
        wait_for(lambda: in_training(launched, 3), launched)
        launched.process.send_signal(number)
        ended = launched.wait(timeout=120)
        launched.assert_nothing_left()
    (line,) = said(ended.stdout)
    assert re.fullmatch(
        rf"finetune: ended by {what} at step \d+ of 400; the same command with --load \S+ continues from "
        r"iteration \d+",
        line,
    )
    if start is LONE:
        assert ended.returncode == 128 + number and "Traceback" not in ended.stdout
        assert ended.stdout.splitlines()[-1] == line
    else:
        # torch's launcher has a traceback of its own, of the signal.
        assert ended.returncode != 0 and "KeyboardInterrupt" not in ended.stdout


def test_a_second_ctrl_c_waits_for_nothing():
    program = """
import os, signal, time
from qtarget_megatron.megatron.faults import ending

def main():
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1000)

ending._describe = lambda: time.sleep(1000)  # a file system that does not answer
ending.run("command", main)
"""
    with Launch([*HEEDING, sys.executable, "-c", program]) as launched:
        assert launched.wait(timeout=60).returncode == 130


# ---- leftovers


def test_ranks_end_with_their_launcher(workspace):
    words = command(workspace, "--num-workers", 1, "--save", workspace / "orphans", "--save-interval", 1)
    with Launch([*TORCHRUN, *words]) as launched:
        wait_for(lambda: in_training(launched, 3), launched)
        # torchrun, two ranks and their data workers.
        assert len(launched.processes()) >= 5
        launched.process.kill()
        launched.process.wait()
        launched.assert_nothing_left()
        assert re.search(r"finetune: error on rank 0: torchrun \(process \d+\) is gone", launched.output())


def test_the_process_of_saves_in_the_background_ends_with_a_killed_command():
    program = """
from qtarget_megatron.megatron.runtime import cpu_platform, launch
if __name__ == "__main__":
    cpu_platform.activate()
    launch.prepare_saves(in_background=True)
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue
    get_write_results_queue().put("written")
    print(get_write_results_queue().get(), flush=True)
    launch.time.sleep(1000)
"""
    with Launch([sys.executable, "-c", program]) as launched:
        wait_for(lambda: "written" in launched.output(), launched)
        # With multiprocessing's tracker of resources.
        assert len(launched.processes()) == 3
        launched.process.kill()
        launched.process.wait()
        launched.assert_nothing_left()


def test_a_save_that_is_waited_for_starts_no_process():
    assert run_ranks(1, bring_an_outcome, timeout=60, megatron=True) == [("written", [])]


def bring_an_outcome():
    from megatron.core.dist_checkpointing.strategies.filesystem_async import get_write_results_queue

    launch.prepare_saves()
    get_write_results_queue().put("written")
    return get_write_results_queue().get_nowait(), multiprocessing.active_children()


def test_a_rank_that_torchrun_has_not_started_outlives_its_shell(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ending._launcher() is None
    # An interactive shell below a rank, or a scheduler's variable that was passed on: no parent is torchrun.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert ending._launcher() is None


# ---- the cause


def test_the_cause_is_what_the_launcher_shows(workspace):
    """Of rank 1, while rank 0 waits for it: no ValueError, and no fault that is known."""
    with Launch([*TORCHRUN, *command(workspace)], {"HAPPENS": "raise"}) as launched:
        ended = launched.wait(timeout=120)
        launched.assert_nothing_left()
    assert ended.returncode == 1
    output = ended.stdout
    line = "finetune: error on rank 1: RuntimeError: the objective has had enough; in step "
    # Printed by the rank after the traceback, and shown by the launcher as the root cause.
    assert [text.startswith(line) for text in said(output)] == [True], said(output)
    root = output[output.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in root and "exitcode  : 1" in root
    assert "slow.py" in root and line in root


def test_the_first_cause_counts_and_is_in_torchs_format(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    record_cause("nobody asks")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    record_cause("finetune: error: the disk is full")
    record_cause("finetune: error: another rank has ended")
    shown = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    assert shown.message["message"] == shown.message["extraInfo"]["py_callstack"] == "finetune: error: the disk is full"
    assert abs(shown.timestamp - time.time()) < 60
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "absent" / "error.json"))
    record_cause("nowhere to write it")


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


class Refusing(Killed):
    def __getitem__(self, index):
        raise ValueError("d.jsonl:7: expected JSON, got Extra data at column 3")


def of_worker(error):
    """The line of a training that ends by an error which the loader has raised."""
    watchdog = SimpleNamespace(step=3, tell=lambda: True)
    fault = explained(error, argparse.Namespace(save=None), watchdog)
    assert not fault.already_reported and "\n" not in str(fault)
    return str(fault)


def test_a_data_worker_that_was_killed_is_named():
    with pytest.raises(RuntimeError) as raised:
        list(torch.utils.data.DataLoader(Killed(), num_workers=1))
    line = r"step 3: data worker \d+ has ended \(out of memory\? fewer --num-workers need less\); nothing .*"
    assert re.fullmatch(line, of_worker(raised.value))
    # In torch's words, of which it has the first at times only.
    for words, line in (
        ("DataLoader worker (pid 71) is killed by signal: Segmentation fault. ", "71 has ended: Segmentation fault; "),
        ("DataLoader worker (pid(s) 71, 72) exited unexpectedly", "71, 72 has ended (out of memory? fewer --num-"),
    ):
        with pytest.raises(RuntimeError) as raised:
            raise RuntimeError(words)
        assert of_worker(raised.value).startswith(f"step 3: data worker {line}")


def test_what_a_data_worker_refuses_is_its_own_line():
    """torch adds the worker's traceback to it."""
    with pytest.raises(ValueError, match="Traceback") as raised:
        list(torch.utils.data.DataLoader(Refusing(), num_workers=1))
    line = of_worker(raised.value)
    assert line.startswith("step 3: d.jsonl:7: expected JSON, got Extra data at column 3; nothing "), line


# ---- command lines


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning-rate", "1e-4"], "unknown flag --learning-rate (did you mean --lr?): --help lists"),
        (["--output-dir=X"], "unknown flag --output-dir (did you mean --save-hf or --save?): --help"),
        (["--micro_batch_size", "2"], "unknown flag --micro_batch_size (did you mean --micro-batch-size?): --help"),
        (["--micro-batch-sise", "-2"], "unknown flag --micro-batch-sise (did you mean --micro-batch-size?): --help"),
        (["--zzz", "1", "-x"], "unknown flags --zzz, -x: --help lists"),
        (
            ["--batch-size", "4", "--zzz"],
            "unknown flags --batch-size (did you mean --micro-batch-size?), --zzz: ",
        ),
        (["train.jsonl"], "unexpected 'train.jsonl': expected a flag before it: --help"),
        (["--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["--lr"], "argument --lr: expected one argument"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message):
    parser = Parser(allow_abbrev=False)
    for flag, kind in (("--lr", float), ("--micro-batch-size", int), ("--save", str), ("--save-hf", str)):
        parser.add_argument(flag, type=kind)
    with pytest.raises(ValueError) as refused:
        parser.parse_args(words)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_a_missing_flag_may_have_another_name():
    parser = Parser(allow_abbrev=False)
    for flag in ("--hf-model", "--save"):
        parser.add_argument(flag, required=True)
    with pytest.raises(ValueError) as refused:
        parser.parse_known_args(["--model_name_or_path", "X", "--lr=1", "--save=Y"])
    assert str(refused.value) == (
        "the following arguments are required: --hf-model; --model_name_or_path: did you mean --hf-model?"
    )


# ---- what is printed


def print_arguments(shown):
    from megatron.training.arguments import _print_args

    with contextlib.redirect_stdout(io.StringIO()) as printed, logs.without_arguments(shown=shown):
        print("before\nbe", end="")
        print("tween")
        _print_args("arguments", argparse.Namespace(lr=1, seed=2))
        print("after\nthe end", end="")
    return printed.getvalue()


@pytest.mark.parametrize("shown", [False, True])
def test_the_list_of_arguments_is_left_out(shown):
    (printed,) = run_ranks(1, print_arguments, (shown,), megatron=True)
    assert printed.startswith("before\nbetween\n") and printed.endswith("after\nthe end")
    assert (" seed ." in printed) == shown and ("arguments" in printed) == shown
