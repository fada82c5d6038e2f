"""When a loss that is not finite is looked at, and what is said."""

from types import SimpleNamespace

import pytest
import torch

from qtarget_megatron.megatron import cpu_platform
from qtarget_megatron.megatron.faults import NotFinite

MICRO_BATCHES = 3


class OnGpu(torch.Tensor):
    """A loss that says it lies on a GPU."""

    is_cuda = True


@pytest.fixture(autouse=True)
def check(monkeypatch):
    cpu_platform.activate()
    from megatron.core.rerun_state_machine import RerunMode

    from qtarget_megatron.megatron import loss_check

    monkeypatch.setattr(loss_check, "get_num_microbatches", lambda: MICRO_BATCHES)
    monkeypatch.setattr(loss_check, "get_rerun_state_machine", lambda: machine)
    monkeypatch.setattr(loss_check.dist, "get_rank", lambda: 5)
    monkeypatch.setattr(loss_check.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
    monkeypatch.setattr(loss_check, "get_args", lambda: SimpleNamespace(curr_iteration=6))
    machine = SimpleNamespace(get_mode=lambda: RerunMode.DISABLED)
    return loss_check.LossCheck()


def losses(kind, *values):
    return [torch.tensor(value).as_subclass(kind) for value in values]


def look(check, found, on_nan="stop", in_training=True):
    """How many micro-batches were looked at when it stopped, None: all."""
    for index, loss in enumerate(found):
        try:
            check.look(loss, torch.tensor([10 * index]), on_nan, in_training=in_training)
        except NotFinite as error:
            return index, str(error)
    return None


NAN, INF = float("nan"), float("inf")


def test_on_the_cpu_at_once(check):
    index, line = look(check, losses(torch.Tensor, 1.0, NAN, 1.0))
    assert index == 1 and line.startswith("the loss of record(s) [10] (counted from 0) is nan on rank 5")


def test_on_a_gpu_with_the_last_micro_batch_of_the_step(check):
    assert look(check, losses(OnGpu, 1.0, 2.0, 3.0)) is None
    index, line = look(check, losses(OnGpu, 1.0, INF, 1.0))
    assert index == MICRO_BATCHES - 1 and "record(s) [10]" in line and "is inf" in line


def test_an_evaluation_has_no_steps(check):
    index, line = look(check, losses(OnGpu, NAN), in_training=False)
    assert index == 0 and "record(s) [0]" in line


def test_each_that_is_skipped_is_named(check, capsys):
    assert look(check, losses(OnGpu, NAN, 1.0, INF), on_nan="skip") is None
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all("step 7 is skipped" in line for line in lines)
    assert "[0]" in lines[0] and "[20]" in lines[1]
    assert look(check, losses(OnGpu, NAN, 1.0), on_nan="skip", in_training=False) is None
    assert capsys.readouterr().out == ""
