"""The teacher's time: read without waiting, once, and not piling up where nobody asks."""

import time

import pytest
import torch

from qtarget_megatron.megatron.model.teacher_cost import TeacherCost


class Event:
    """An event of a device that has done its work when `done` says so."""

    done = True

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.seconds = time.perf_counter()

    def query(self):
        return Event.done

    def elapsed_time(self, other):
        return 1000 * (other.seconds - self.seconds)


@pytest.fixture
def cost(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(Event, "done", True)
    return TeacherCost()


def measure(cost, seconds=0.01):
    with cost:
        time.sleep(seconds)


def test_each_forward_is_counted_once(cost):
    started = time.perf_counter()
    measure(cost)
    measure(cost)
    assert 20 <= cost.take_milliseconds() <= 1000 * (time.perf_counter() - started)
    assert cost.take_milliseconds() == 0


def test_what_the_device_has_not_done_comes_later(cost):
    Event.done = False
    measure(cost)
    assert cost.take_milliseconds() == 0
    Event.done = True
    assert cost.take_milliseconds() >= 10


def test_events_do_not_pile_up_where_nobody_takes_the_time(cost):
    for _ in range(100):
        measure(cost, seconds=0)
    assert len(cost._running) == 1
