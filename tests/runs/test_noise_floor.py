"""The bounds between layouts: one process is within them on this processor too, and small faults are not."""

import contextlib
import importlib
from unittest import mock

import pytest
from finetune_runs import run_all, write_data, write_models
from layout_runs import SEQUENCE_PARALLEL, assert_same_training, compare_exports, launch, tp
from noise_floor import ORDERS, differences, floor, kinds, run_reordered

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]

REORDERED = ("experts target-sft", "untied target-sft")
FIRST, *OTHERS = ORDERS


# ---- faults


def gradient_times(factor, part):
    """Of the parameter whose name, as a GPTModel has it, holds part."""
    from megatron.training import training

    from qtarget_megatron.megatron.weights.layer_names import named_parameters

    def scaled(model, *args, original=training.finalize_model_grads, **kwargs):
        original(model, *args, **kwargs)
        chunk = model[0]
        while hasattr(chunk, "module"):
            chunk = chunk.module
        (found,) = [parameter for name, parameter in named_parameters(chunk) if part in name]
        found.main_grad.mul_(factor)

    return mock.patch.object(training, "finalize_model_grads", scaled)


def norms_not_summed():
    """Over the ranks that share a sequence. A loss curve hardly shows it."""
    # The package has a function of the same name.
    module = importlib.import_module("megatron.core.distributed.finalize_model_grads")
    return mock.patch.object(module, "_allreduce_non_tensor_model_parallel_grads", lambda *args, **kwargs: None)


def hidden_not_summed():
    """The gradient of the head's input, of which each rank has the part of its vocabulary."""
    from qtarget_megatron import collectives

    return mock.patch.object(collectives, "sum_in_place", lambda partial, group: partial)


# More flags, and what is broken.
ALONE = {
    "a norm's gradient is 1% off": ([], lambda: gradient_times(1.01, "final_layernorm.weight")),
    "a matrix's gradient is 0.1% off": ([], lambda: gradient_times(1.001, "layers.1.mlp.linear_fc2.weight")),
    "the learning rate is 0.1% off": (["--lr", 1.001e-3, "--min-lr", 1e-3], contextlib.nullcontext),
    "Adam's epsilon is another": (["--adam-eps", 1e-6], contextlib.nullcontext),
}
AT_TP2 = {
    "norms are not summed": ([*tp(2), *SEQUENCE_PARALLEL], norms_not_summed),
    "hidden states are not summed": (tp(2), hidden_not_summed),
}


def run_faulty(runs, folder):
    found = {}
    for name, words in runs.items():
        with (ALONE | AT_TP2)[name][1]():
            found |= run_all({name: words}, folder)
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("floor")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def run_alone(runs, folder):
    reordered = {name: (words, ORDERS[name.split(", ")[-1]][1]) for name, words in runs.items() if name not in ALONE}
    return run_reordered(reordered, folder) | run_faulty({name: runs[name] for name in ALONE}, folder)


@pytest.fixture(scope="module")
def alone(workspace):
    words = kinds(workspace)
    runs = {
        f"{kind}, {order}": [*words[kind], "--micro-batch-size", size, "--save-hf", workspace / f"{kind}, {order}"]
        for kind in REORDERED
        for order, (size, _) in ORDERS.items()
    }
    runs |= {fault: [*words["untied target-sft"], *flags] for fault, (flags, _) in ALONE.items()}
    return launch(1, runs, workspace, timeout=200, run=run_alone)


@pytest.mark.parametrize("kind", REORDERED)
def test_one_process_is_within_the_floor_on_this_processor(workspace, alone, kind):
    """Twice the floor leaves as much for what a layout adds. If this fails, so will layouts: measure again."""
    expected, largest = alone[f"{kind}, {FIRST}"]["scalars"], 0.0
    for order in OTHERS:
        found = alone[f"{kind}, {order}"]["scalars"]
        for tag, step, difference in differences(found, expected):
            largest = max(largest, difference)
            assert difference <= 2 * floor(tag, step), (order, tag, step)
        compare_exports(workspace / f"{kind}, {order}", workspace / f"{kind}, {FIRST}", workspace / kind.split()[0])
    assert largest > 0, "nothing was reordered"


def is_noticed(result, alone):
    try:
        assert_same_training(result, alone[f"untied target-sft, {FIRST}"])
    except AssertionError:
        return True
    return False


def test_small_faults_exceed_a_bound(alone):
    assert {fault: is_noticed(alone[fault], alone) for fault in ALONE} == dict.fromkeys(ALONE, True)


def test_sums_that_a_layout_leaves_out_exceed_a_bound(workspace, alone):
    words = kinds(workspace)["untied target-sft"]
    runs = {fault: [*words, *flags] for fault, (flags, _) in AT_TP2.items()}
    results = launch(2, runs, workspace, timeout=200, run=run_faulty)
    assert {fault: is_noticed(results[fault], alone) for fault in AT_TP2} == dict.fromkeys(AT_TP2, True)
