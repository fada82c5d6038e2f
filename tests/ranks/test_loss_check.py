"""When a loss that is not finite is looked at, and what is said."""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from launching import run_ranks

from qtarget_megatron.megatron.faults.explained import NotFinite
from qtarget_megatron.megatron.runtime import logs

pytestmark = pytest.mark.distributed
MICRO_BATCHES = 3


class OnGpu(torch.Tensor):
    """A loss that says it lies on a GPU."""

    is_cuda = True


def look(kind, values, on_nan="stop", in_training=True):
    """How many micro-batches were looked at when it stopped (None: all), the error's line, what was printed."""
    from megatron.core.rerun_state_machine import RerunMode

    from qtarget_megatron.megatron.faults import loss_check

    machine = SimpleNamespace(get_mode=lambda: RerunMode.DISABLED)
    replacements = {
        "get_num_microbatches": lambda: MICRO_BATCHES,
        "get_rerun_state_machine": lambda: machine,
        "get_args": lambda: SimpleNamespace(curr_iteration=6),
    }
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as printed, logs.shown():
        for name, value in replacements.items():
            patch.setattr(loss_check, name, value)
        patch.setattr(loss_check.dist, "get_rank", lambda: 5)
        patch.setattr(loss_check.parallel_state, "get_tensor_model_parallel_rank", lambda: 0)
        check = loss_check.LossCheck()
        for index, value in enumerate(values):
            loss = torch.tensor(value).as_subclass(kind)
            try:
                check.look(loss, torch.tensor([10 * index]), on_nan, in_training=in_training)
            except NotFinite as error:
                return index, str(error), printed.getvalue()
    return None, "", printed.getvalue()


def all_looks():
    return {name: look(*arguments) for name, arguments in CASES.items()}


NAN, INF = float("nan"), float("inf")
CASES = {
    "on the CPU": (torch.Tensor, (1.0, NAN, 1.0)),
    "finite": (OnGpu, (1.0, 2.0, 3.0)),
    "on a GPU": (OnGpu, (1.0, INF, 1.0)),
    "evaluation": (OnGpu, (NAN,), "stop", False),
    "skipped": (OnGpu, (NAN, 1.0, INF), "skip"),
    "skipped in evaluation": (OnGpu, (NAN, 1.0), "skip", False),
}


@pytest.fixture(scope="module")
def looks():
    (found,) = run_ranks(1, all_looks, megatron=True)
    return found


def test_on_the_cpu_at_once(looks):
    index, line, _ = looks["on the CPU"]
    assert index == 1 and line.startswith("the loss of record(s) [10] (counted from 0) is nan on rank 5")


def test_on_a_gpu_with_the_last_micro_batch_of_the_step(looks):
    assert looks["finite"] == (None, "", "")
    index, line, _ = looks["on a GPU"]
    assert index == MICRO_BATCHES - 1 and "record(s) [10]" in line and "is inf" in line


def test_an_evaluation_has_no_steps(looks):
    index, line, _ = looks["evaluation"]
    assert index == 0 and "record(s) [0]" in line


def test_each_that_is_skipped_is_named(looks):
    index, _, printed = looks["skipped"]
    lines = printed.splitlines()
    assert index is None and len(lines) == 2 and all("step 7 is skipped" in line for line in lines)
    assert "[0]" in lines[0] and "[20]" in lines[1]
    assert looks["skipped in evaluation"] == (None, "", "")
