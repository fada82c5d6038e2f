"""Schedules of an objective's parameters: what is written, the value of each step, what is refused."""

import math

import pytest

from qtarget_megatron import objectives
from qtarget_megatron.objectives import ScheduledObjective
from qtarget_megatron.objectives.schedules import parse_schedule


def values(word, steps=10):
    schedule = parse_schedule(word)
    return [schedule.value(step, steps) for step in range(steps)]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("eta=0:1@0-50%", [0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1, 1]),
        ("eta=1:0@2-4", [1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0]),
        ("eta=0.3@0-100%", [0.3] * 10),
        ("lam=1@0-50%,0.1@50-100%", [1] * 5 + [0.1] * 5),
        # Between two pieces the value of the first one's end stays.
        ("lam=0:1@1-3,1:0@6-8", [0, 0, 0.5, 1, 1, 1, 1, 0.5, 0, 0]),
        ("alpha=-1:1e0@0-4:cosine", [-1, -math.cos(math.pi / 4), 0, math.cos(math.pi / 4), 1, 1, 1, 1, 1, 1]),
        # One that goes on behind the training's end.
        ("eta=0:1@0-20", [step / 20 for step in range(10)]),
        ("eta=.5:1.@2.5-4.5", [0.5, 0.5, 0.5, 0.625, 0.875, 1, 1, 1, 1, 1]),
    ],
)
def test_the_value_of_each_step(word, expected):
    assert values(word) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("steps", [1, 3, 7, 1000])
def test_a_share_of_the_training_goes_by_its_length(steps):
    found = values("eta=0:1@0-50%", steps)
    assert found == pytest.approx([min(2 * step / steps, 1) for step in range(steps)], abs=1e-12)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("eta", "a schedule is NAME=FROM:TO@START-END"),
        ("=0:1@0-2", "a schedule is NAME=FROM:TO@START-END"),
        ("eta=0.5", "'0.5' is no FROM"),
        ("eta=0:1@0", "'0:1@0' is no FROM"),
        ("eta=0:one@0-2", "'0:one@0-2' is no FROM"),
        ("eta=0:nan@0-2", "'0:nan@0-2' is no FROM"),
        ("eta=0:1@0-2:square", "a shape is one of linear, cosine, got 'square'"),
        ("eta=0:1@2-2", "must begin before it ends"),
        ("eta=0:1@0-120%", "a share at 100% at most"),
        ("eta=0:1@0-50%,1@40-60%", "'1@40-60%' begins before the piece before it ends"),
        ("eta=0:1@0-50%,1@60-80", "give all pieces in steps, or all in %"),
    ],
)
def test_what_is_no_schedule_is_refused(word, message):
    with pytest.raises(ValueError, match=message):
        parse_schedule(word)


def test_an_objective_of_each_step():
    scheduled = ScheduledObjective("target-sft", [], ["eta=0:1@0-4"])
    assert [scheduled.at(step, 8).parameters for step in (0, 1, 4, 7)] == [
        (("eta", eta),) for eta in (0.0, 0.25, 1.0, 1.0)
    ]
    assert scheduled.at(1, 8).residuals == ((0.75, 0.25),)
    # The same object for every micro-batch of a step.
    assert scheduled.at(1, 8) is scheduled.at(1, 8)
    # At eta 0 no teacher is read; the training is prepared for one.
    assert not scheduled.at(0, 8).needs_teacher and scheduled.widest.needs_teacher
    assert str(scheduled) == "target-sft(eta=0:1@0-4)"


def test_several_parameters_beside_fixed_ones():
    scheduled = ScheduledObjective("jsd", ["beta=0.3"], ["lam=0:1@0-50%"])
    assert scheduled.at(5, 10).parameters == (("beta", 0.3), ("lam", 1.0))
    assert scheduled.at(0, 10).parameters == objectives.jsd(0.3, 0.0).parameters
    scheduled = ScheduledObjective("psft", [], ["epsilon_low=0.1:0.3@0-2", "epsilon_high=0.2:0.4@0-2:cosine"])
    assert scheduled.values(1, None) == pytest.approx((0.2, 0.3)) and str(scheduled).count("@") == 2


@pytest.mark.parametrize(
    ("name", "fixed", "schedules", "message"),
    [
        ("target-sft", ["eta=0.5"], ["eta=0:1@0-2"], "'eta' is given twice"),
        ("target-sft", [], ["eta=0:1@0-2", "eta=0:1@0-2"], "'eta' is given twice"),
        ("target-sft", [], ["lam=0:1@0-2"], "'target-sft' has no parameter 'lam': its parameters are eta"),
        ("target-sft", [], ["eta=0:1.5@0-2"], r"eta must be a number in \[0, 1\], got 1.5"),
        ("target-sft", [], ["eta=0.5:1@0-2,1:-1@2-4"], r"eta must be a number in \[0, 1\], got -1.0"),
        ("nothing", [], ["eta=0:1@0-2"], "unknown objective 'nothing'"),
        ("eaft", [], ["k=10:20@0-2"], "k must be a whole number of logits"),
        ("profit", ["denominator='kept'"], ["denominator=0:1@0-2"], "'denominator' is given twice"),
    ],
)
def test_a_schedule_that_the_objective_cannot_follow_is_refused(name, fixed, schedules, message):
    with pytest.raises(ValueError, match=message):
        ScheduledObjective(name, fixed, schedules)


def test_a_share_of_a_training_of_unknown_length_is_refused():
    ScheduledObjective("target-sft", [], ["eta=0:1@0-2"]).check_length(None)
    with pytest.raises(ValueError, match=r"eta=0:1@0-20%: a share of the training needs its length"):
        ScheduledObjective("target-sft", [], ["eta=0:1@0-20%"]).check_length(None)
