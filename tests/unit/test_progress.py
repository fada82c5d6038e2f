"""How far a run is: lines in a log, a bar on a terminal."""

import re
import sys

import pytest

from qtarget_megatron.megatron.runtime import progress
from qtarget_megatron.megatron.runtime.progress import Progress


class Clock:
    now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_five_seconds_and_at_the_end(printed_log, clock):
    bar = Progress("tool", 10, 2)
    for done in range(3, 11):
        clock.now += 2
        bar.report(done)
    bar.report(10)
    lines = printed_log.readouterr().out.splitlines()
    assert lines == [
        "tool: 3/10 samples, 0.5 samples/s, 0:00:14 left",
        "tool: 6/10 samples, 0.5 samples/s, 0:00:08 left",
        "tool: 9/10 samples, 0.5 samples/s, 0:00:02 left",
        "tool: 10/10 samples, 0.5 samples/s, 0:00:00 left",
    ]


def test_bytes_are_added_up_and_shown_in_their_unit(printed_log, clock):
    bar = Progress("tool: writing", 4_000_000_000, unit="GB", scale=1e9)
    clock.now += 8
    bar.add(500_000_000)
    bar.add(500_000_000)
    clock.now += 8
    bar.add(3_000_000_000)
    lines = printed_log.readouterr().out.splitlines()
    assert lines[0] == "tool: writing: 0.5/4 GB, 0.0625 GB/s, 0:00:56 left"
    assert lines[1:] == ["tool: writing: 4/4 GB, 0.25 GB/s, 0:00:00 left"]


def test_a_terminal_gets_a_bar_drawn_over_itself(printed_log, clock, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    bar = Progress("tool", 4)
    for done in range(1, 5):
        clock.now += 1
        bar.report(done)
    text = printed_log.readouterr().out
    assert text.count("\n") == 1 and text.endswith("\n")
    drawn = text.split("\r")[1:]
    assert [re.search(r"\[(#*)\.*\]", line)[1] for line in drawn] == ["#" * n for n in (6, 12, 18, 24)]
    assert all(line.rstrip("\n").endswith("left\x1b[K") for line in drawn)


def test_only_the_first_rank_speaks_and_nothing_to_do_is_no_error(printed_log, clock, monkeypatch):
    Progress("tool", 0).report(0)
    assert printed_log.readouterr().out == "tool: 0/0 samples, 0 samples/s, unknown time left\n"
    monkeypatch.setenv("RANK", "1")
    bar = Progress("tool", 1)
    bar.report(1)
    assert printed_log.readouterr().out == ""
