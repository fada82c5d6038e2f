"""The package's log: silent until somebody asks for it, printed by a command, and what is left out of torch's and
Megatron's."""

import json
import logging
import subprocess
import sys

import pytest
from launching import REPOSITORY

from qtarget_megatron import output_lock
from qtarget_megatron.megatron.runtime import logs

NAME = "qtarget_megatron"


def python(code, *words, rank=0, flags=()):
    """Of an interpreter in which nothing has set up a log, as a rank: stdout and stderr."""
    done = subprocess.run(
        [sys.executable, *flags, "-c", code, *words],
        cwd=REPOSITORY,
        env={"RANK": str(rank), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def left_lock(folder):
    """A lock of this host whose process has ended: taking it over is a line of the log."""
    path = folder / "lock"
    path.write_text(json.dumps({"host": output_lock.socket.gethostname(), "process": 7, "since": "then", "beat": 1}))
    return path


# ---- a script of somebody's own

USE = f"""
import logging, sys
import {NAME}, {NAME}.data
from {NAME} import output_lock
from {NAME}.megatron.runtime import logs, progress
log = logging.getLogger("{NAME}")
assert [type(handler) for handler in log.handlers] == [logging.NullHandler], log.handlers
assert (log.level, log.propagate, logging.getLogger().handlers) == (logging.NOTSET, True, [])
def use():
    output_lock.claim(sys.argv[1], "it")
    progress.Progress("score", 1).report(1)
    log.warning("what is to be known")
"""


def test_a_script_prints_nothing_of_the_log(tmp_path):
    assert python(f"{USE}\nuse()", str(left_lock(tmp_path)), flags=["-W", "default"]) == ("", "")


def test_a_script_gets_the_lines_in_its_own_handler(tmp_path):
    set_up = "logging.basicConfig(level='INFO', format='%(levelname)s|%(name)s|%(message)s', stream=sys.stdout)"
    out, errors = python(f"{USE}\n{set_up}\nuse()", str(left_lock(tmp_path)))
    lock, progress, warning = out.splitlines()
    assert lock.startswith(f"INFO|{NAME}|{tmp_path / 'lock'} was left by process 7 on ") and errors == ""
    assert progress.startswith(f"INFO|{NAME}.score|1/1 samples, ")
    assert warning == f"WARNING|{NAME}|what is to be known"


# ---- a command


def say():
    log = logging.getLogger(NAME)
    log.info("begins with %s", "100%")
    logs.of("score").info("reads")
    log.warning("looks odd")
    log.info("is the last rank's", extra=logs.ANY_RANK)
    log.error("ends")
    logging.getLogger(f"{NAME}_of_another").error("is none of it")


def test_a_command_prints_each_line_once_and_leaves_the_log_as_it_was(capsys, caplog):
    root = logging.StreamHandler(sys.stdout)  # as Megatron's, or that of whoever calls a command from Python
    logging.getLogger().addHandler(root)
    try:
        with logs.shown(), logs.shown():
            say()
            logging.getLogger().removeHandler(root)
    finally:
        logging.getLogger().removeHandler(root)
    printed = capsys.readouterr()
    assert printed.out.splitlines() == [
        "qtarget_megatron: begins with 100%",
        "score: reads",
        "qtarget_megatron: is the last rank's",
        "is none of it",
    ]
    assert printed.err.splitlines() == ["qtarget_megatron: WARNING: looks odd", "qtarget_megatron: error: ends"]
    log = logging.getLogger(NAME)
    assert [type(handler) for handler in log.handlers] == [logging.NullHandler]
    assert (log.level, log.propagate) == (logging.NOTSET, True)


def test_other_ranks_print_what_is_theirs_and_errors(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with logs.shown():
        say()
    printed = capsys.readouterr()
    assert printed.out == "qtarget_megatron: is the last rank's\n"
    assert "qtarget_megatron: error: ends\n" in printed.err and "WARNING" not in printed.err


# ---- what torch and Megatron say

SPEAKERS = f"""
import logging, sys, warnings
from {NAME}.megatron.runtime import logs
logs.quiet(sys.argv[1:])
logging.basicConfig(level="INFO")  # as Megatron does when it is imported
megatron, gpt = logging.getLogger("megatron.core.timers"), logging.getLogger("megatron.core.models.gpt.gpt_model")
rerun, own = logging.getLogger("megatron.core.rerun_state_machine"), logging.getLogger("mine")
gpt.warning("GPTModel IS DEPRECATED. Please")
rerun.warning("Setting RerunStateMachine mode off")
megatron.info("a time"), megatron.warning("odd in megatron"), megatron.error("wrong in megatron")
rerun.warning("a result differs here"), own.info("my line"), own.warning("GPTModel IS DEPRECATED is my warning")
def warn(text, module, category=UserWarning):
    warnings.warn_explicit(text, category, f"{{module}}.py", 1, module=module)
warn("`torch.distributed.reduce_scatter_tensor` is deprecated.", "torch.distributed.c10d_logger", FutureWarning)
warn("odd in torch", "torch.nn.modules"), warn("odd in mine", "my_objective")
warn("`torch.distributed.reduce_scatter_tensor` is deprecated.", "my_objective", FutureWarning)
"""
KNOWN = {"GPTModel IS DEPRECATED. Please", "Setting RerunStateMachine mode off"}
SAME = {"odd in megatron", "odd in torch"}
OWN = {"my line", "GPTModel IS DEPRECATED is my warning", "odd in mine", "a time"}
FAULTS = {"wrong in megatron", "a result differs here"}
DEPRECATED = "`torch.distributed.reduce_scatter_tensor` is deprecated."


def said(*words, **others):
    lines = "".join(python(SPEAKERS, *words, **others)).splitlines()
    return {line.partition(": ")[2].partition(": ")[2] or line.rpartition(":")[2] for line in lines}, lines


def test_what_says_nothing_to_a_user_is_left_out_and_nothing_else():
    found, lines = said()
    assert found == SAME | OWN | FAULTS | {DEPRECATED}
    assert [line for line in lines if DEPRECATED in line] == [f"my_objective.py:1: FutureWarning: {DEPRECATED}"]
    # In the words of Megatron's handler, which does not print them again.
    assert (
        lines.count("INFO:megatron.core.timers:a time")
        == lines.count("ERROR:megatron.core.timers:wrong in megatron")
        == 1
    )


def test_other_ranks_repeat_no_warning_and_hide_no_fault_of_their_own():
    found, _ = said(rank=1)
    assert found == OWN | FAULTS | {DEPRECATED}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("words", [["--logging-level", "10"], ["--lr", "1", "--logging-level=10"]])
def test_the_logging_level_of_megatron_shows_everything(rank, words):
    found, lines = said(*words, rank=rank)
    assert found == KNOWN | SAME | OWN | FAULTS | {DEPRECATED}
    assert sum(DEPRECATED in line for line in lines) == 2


@pytest.mark.parametrize("words", [["--logging-level", "loud"], ["--logging-level"], ["--logging-level", "20"]])
def test_a_level_that_is_none_is_not_judged_here(words):
    assert said(*words)[0] == SAME | OWN | FAULTS | {DEPRECATED}


def test_pythons_own_flag_goes_before():
    _, lines = said(flags=["-W", "default"], rank=1)
    assert sum(DEPRECATED in line for line in lines) == 2 and not any("GPTModel IS DEPRECATED. " in x for x in lines)
