"""Fine-tuning from a cached teacher: with everything kept it is the live one, at every layout and micro-batch size."""

import json
import shutil

import numpy as np
import pytest
from finetune_runs import run_all, run_tool, write_data, write_models
from launching import run_ranks
from layout_runs import (
    DISTRIBUTED_OPTIMIZER,
    SEQUENCE_PARALLEL,
    assert_layouts,
    assert_same_training,
    launch,
    pp,
    tp,
)
from small_tokenizers import LLAMA3, byte_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    vocabulary = json.loads((folder / "teacher" / "config.json").read_text())["vocab_size"]
    for name, k, ranks, layout in (("all", vocabulary, 2, tp(2)), ("some", 64, 4, [*tp(2), *pp(2)])):
        words = ["--teacher-hf", folder / "teacher", "--data", folder / "train.jsonl", "--out", folder / name]
        words += ["--k", k, "--dtype", "float32", "--seq-length", SEQ_LENGTH, "--micro-batch-size", 3, *layout]
        for code, printed in run_ranks(ranks, run_tool, ("cache_teacher", words), timeout=200, megatron=True):
            assert code == 0, printed[-3000:]
    for name in ("live", "cached"):
        (folder / f"weighted_{name}.py").write_text(WEIGHTED_KD.replace("NAME", f"weighted-{name}"))
    shutil.copytree(folder / "untied", folder / "other-template")
    byte_tokenizer(LLAMA3, eos="<|im_end|>").save_pretrained(folder / "other-template")
    return folder


# Both a second model and a side input; the published objectives read one or the other.
WEIGHTED_KD = """
from qtarget_megatron import objectives

@objectives.register("NAME")
def weighted_kd():
    def evaluate(stats, inputs):
        weight = inputs["weight"]
        return weight * stats.cross_entropy(), 0.0, [weight]

    return objectives.Objective(evaluate, residuals=((0.0, 1.0),), token_inputs=("weight",))
"""


@pytest.fixture(scope="module")
def models(workspace):
    student = ["--hf-model", workspace / "untied", "--sft-train", workspace / "train.jsonl"]
    target = [*student, "--objective", "target-sft", "--objective-args", "eta=0.4"]
    kd, hot = [*student, "--objective", "kd"], ["--objective-args", "temperature=2"]
    # Two names: both are registered in one process.
    weighted_live, weighted_cached = (
        [*student, "--objective-file", workspace / f"weighted_{name}.py", "--objective", f"weighted-{name}"]
        for name in ("live", "cached")
    )
    live, every, some = (
        [flag, workspace / name]
        for flag, name in (("--teacher-hf", "teacher"), ("--teacher-cache", "all"), ("--teacher-cache", "some"))
    )
    return {
        "live target-sft": [*target, *live],
        "cached target-sft": [*target, *every],
        "cached target-sft whole": [*target, *every, "--qtarget-materialize-logits"],
        "live kd": [*kd, *hot, *live],
        "cached kd": [*kd, *hot, *every],
        "live weighted": [*weighted_live, *live],
        "cached weighted": [*weighted_cached, *every],
        **{f"some {rule}": [*target, *some, "--teacher-tail", rule] for rule in ("uniform", "student", "drop")},
    }


@pytest.fixture(scope="module")
def single(workspace, models):
    return launch(1, models, workspace, timeout=240)


def test_a_cache_of_everything_is_the_live_teacher(single):
    for name in ("target-sft", "kd", "target-sft whole", "weighted"):
        live = single[f"live {name.split()[0]}"]["scalars"]["lm loss"]
        # float32 log-probabilities in place of logits: 1e-7 of up to 10 nats in each.
        assert single[f"cached {name}"]["scalars"]["lm loss"] == pytest.approx(live, rel=5e-6), name


def test_the_kept_tokens_leave_little_to_the_tails_rule(single):
    live = single["live target-sft"]["scalars"]["lm loss"]
    for rule in ("uniform", "student", "drop"):
        found = single[f"some {rule}"]["scalars"]["lm loss"]
        assert found != live and found == pytest.approx(live, rel=0.1), rule


def test_every_layout_reads_the_same_cache(workspace, models, single):
    two = {
        "cached target-sft at DP2, 4 a micro-batch": [*models["cached target-sft"], "--micro-batch-size", 4],
        "some student at TP2 with sequence parallelism": [*models["some student"], *tp(2), *SEQUENCE_PARALLEL],
        "some uniform at PP2": [*models["some uniform"], *pp(2)],
    }
    assert_layouts(launch(2, two, workspace, timeout=240), single)
    four = {
        "some drop at TP2PP2": [*models["some drop"], *tp(2), *pp(2)],
        "cached kd at TP4": [*models["cached kd"], *tp(4)],
        "cached weighted at TP2DP2": [*models["cached weighted"], *tp(2), "--micro-batch-size", 2],
    }
    assert_layouts(launch(4, four, workspace, timeout=240), single)


def test_a_step_reports_time_and_memory_of_the_reading(single):
    scalars = single["some uniform"]["scalars"]
    # 32 tokens of 64 ids (8 bytes) and log p (4), and a tail (4).
    assert scalars["teacher MiB"] == pytest.approx([32 * (64 * 12 + 4) / 2**20] * 4)
    assert all(0 < value < 10_000 for value in scalars["teacher ms"])


def test_each_sample_has_the_same_loss_in_any_order_batch_and_layout(workspace, models):
    """Written at TP2PP2 with 3 samples a micro-batch; read one by one, then by two ranks, 2 a micro-batch, shuffled
    otherwise. With a learning rate of 0 a step's loss is the mean over its samples' tokens."""
    frozen = [*models["some student"], "--lr", 0, "--min-lr", 0]
    one = {"alone": [*frozen, "--global-batch-size", 1, "--train-iters", 40]}
    alone = launch(1, one, workspace, timeout=200)["alone"]["scalars"]
    together = [*frozen, "--global-batch-size", 8, "--train-iters", 5, "--micro-batch-size", 2, "--seed", 11]
    shuffled = launch(2, {"shuffled": together}, workspace, timeout=200)["shuffled"]["scalars"]

    def order(seed):
        return np.random.Generator(np.random.PCG64([seed, 0])).permutation(40)

    losses, counts = np.empty(40), np.empty(40)
    losses[order(7)], counts[order(7)] = alone["lm loss"], alone["supervised tokens"]
    for step, samples in enumerate(order(11).reshape(5, 8)):
        weights = counts[samples] / counts[samples].sum()
        assert shuffled["supervised tokens"][step] == pytest.approx(counts[samples].sum())
        assert shuffled["lm loss"][step] == pytest.approx(losses[samples] @ weights, rel=1e-6)


def test_a_run_resumes_in_the_middle_of_an_epoch(workspace, models, single):
    """Two of an epoch's five steps, then the others at another layout."""
    save, words = workspace / "saved", models["some drop"]
    stop = ["--save", save, "--save-interval", 2, "--exit-interval", 2]
    launch(1, {"stopped": [*words, *DISTRIBUTED_OPTIMIZER, *stop]}, workspace, timeout=120)
    resumed = [*words, *DISTRIBUTED_OPTIMIZER, *tp(2), "--load", save]
    result = launch(2, {"resumed": resumed}, workspace, timeout=120)["resumed"]
    assert_same_training(result, single["some drop"], first_step=2)


def test_another_chat_template_is_refused_before_training(workspace, models):
    words = [
        str(word).replace(str(workspace / "untied"), str(workspace / "other-template")) for word in models["some drop"]
    ]
    for result in (
        outcome["run"]
        for outcome in run_ranks(2, run_all, ({"run": words}, str(workspace)), timeout=120, megatron=True)
    ):
        assert result["code"] == 2, result["printed"][-2000:]
        assert "the teacher read other tokens than training does" in result["printed"]
        assert "chat template" in result["printed"] and "iteration        1/" not in result["printed"]
