"""How fast a training is and what is left of it."""

import re
from types import SimpleNamespace

import pytest
from finetune_runs import SEQ_LENGTH, TRAIN_ITERS, run_all, write_data, write_models
from launching import run_ranks

from qtarget_megatron.megatron.training import pace
from qtarget_megatron.megatron.training.pace import Pace


class Training:
    """Megatron's loop, as far as the pace looks at it: args, and steps that take a given time on a clock."""

    def __init__(self, monkeypatch, *, log_interval, train_iters, rank=1):
        self.args = SimpleNamespace(
            log_interval=log_interval, train_iters=train_iters, seq_length=100, consumed_train_samples=0
        )
        self._now = 50.0
        monkeypatch.setattr(pace.time, "monotonic", lambda: self._now)
        monkeypatch.setattr(pace.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(pace.dist, "get_world_size", lambda: 2)
        self._forward = Pace(self.args).watched(lambda data, model: self._forwarded.append(model))
        self._forwarded = []

    def steps(self, seconds, samples=4, first=0):
        """Step after step, each of two micro-batches, with an evaluation in between."""
        for step, duration in enumerate(seconds, first):
            self.args.curr_iteration = step
            for training in (True, True, False):
                self._forward(None, SimpleNamespace(training=training))
            self._now += duration
            self.args.consumed_train_samples += samples
        assert len(self._forwarded) == 3 * len(seconds)


def test_lines_are_of_the_interval_and_of_what_is_left(printed_log, monkeypatch):
    """The first step takes as long as others together, and counts for nothing."""
    Training(monkeypatch, log_interval=2, train_iters=100).steps([500, 10, 10, 10, 20, 20, 20])
    assert printed_log.readouterr().out.splitlines() == [
        "qtarget_megatron: 40 tokens/s, 0:16:20 left",  # behind step 2: 10 s for one step of 400 tokens, 98 left
        "qtarget_megatron: 40 tokens/s, 0:16:00 left",  # behind step 4: 800 tokens in 20 s; 30 s for 3 steps, 96 left
        "qtarget_megatron: 20 tokens/s, 0:21:56 left",  # behind step 6: 800 tokens in 40 s; 70 s for 5 steps, 94 left
    ]


def test_quick_steps_have_a_line_every_ten_seconds(printed_log, monkeypatch):
    Training(monkeypatch, log_interval=1, train_iters=50).steps([3] * 12, first=20)
    assert printed_log.readouterr().out.splitlines() == [
        "qtarget_megatron: 133 tokens/s, 0:01:15 left",  # behind step 25: 12 s after step 21
        "qtarget_megatron: 133 tokens/s, 0:01:03 left",
    ]


def test_the_last_rank_alone_prints(printed_log, monkeypatch):
    Training(monkeypatch, log_interval=1, train_iters=50, rank=0).steps([30] * 5)
    assert not printed_log.readouterr().out


def run_with_lines(runs, folder):
    pace._LINE_SECONDS = 0.0
    return run_all(runs, folder)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_says_its_pace(tmp_path):
    write_models(tmp_path)
    write_data(tmp_path / "train.jsonl", 16, seed=1)
    words = ["--hf-model", tmp_path / "untied", "--sft-train", tmp_path / "train.jsonl", "--objective", "sft"]
    words += ["--pipeline-model-parallel-size", 2]
    arguments = ({"run": [str(word) for word in words]}, str(tmp_path))
    first, last = (of_rank["run"] for of_rank in run_ranks(2, run_with_lines, arguments, 120, megatron=True))
    assert first["code"] == last["code"] == 0, last["printed"][-3000:]
    lines = re.findall(r"iteration +(\d+)/|([\d,]+) tokens/s, 0:00:\d\d left", last["printed"])
    # Behind all steps but the first, which is left out, and the last, behind which nothing begins.
    assert [step or "pace" for step, _ in lines] == ["1", "2", "pace", "3", "pace", "4"]
    assert TRAIN_ITERS == 4
    rates = [int(rate.replace(",", "")) for _, rate in lines if rate]
    assert all(0 < rate < 10_000 * SEQ_LENGTH for rate in rates)
    assert "tokens/s" not in first["printed"]
