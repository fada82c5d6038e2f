"""Rows that hold several samples train as the samples one by one do, at every layout."""

import json
import re
import sys

import numpy as np
import pytest
from finetune_runs import SPOILED, run_all, run_tool, vocabulary, write_data, write_models
from launching import Launch, run_ranks
from layout_runs import (
    DISTRIBUTED_OPTIMIZER,
    SEQUENCE_PARALLEL,
    assert_layouts,
    assert_same_training,
    ep,
    launch,
    pp,
    tensors,
    tp,
)
from noise_floor import MARGIN, TAGS, WEIGHTS_FLOOR, bound, update_difference
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, RowPlan, SampleOrder, aligned_lengths, alignment, encode_at

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SAMPLES, ROW = 40, 64
TARGET = ["--objective", "target-sft", "--objective-args", "eta=0.4"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]
CP = ["--context-parallel-size", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packing")
    write_models(folder)
    write_data(folder / "train.jsonl", SAMPLES, seed=1)
    return folder


@pytest.fixture(scope="module")
def rows(workspace):
    """Rows of an epoch: what a global batch has to count to take in every sample once."""
    file, tokenizer = JsonlFile(workspace / "train.jsonl"), byte_tokenizer(CHATML, eos="<|im_end|>")
    lengths = [min(len(encode_at(file, tokenizer, ROW, i).input_ids), ROW) for i in range(SAMPLES)]
    aligned = aligned_lengths(np.array(lengths), alignment(ROW, 1))
    return len(RowPlan(SampleOrder([SAMPLES], seed=7), aligned, ROW).epoch(0))


@pytest.fixture(scope="module")
def kinds(workspace):
    """The flags of each kind of run but the number of samples or rows in a step."""
    data = ["--sft-train", workspace / "train.jsonl", "--seq-length", ROW]
    models = {name: ["--hf-model", workspace / name, *data] for name in ("untied", "tied", "experts", "latent")}
    return {
        "untied target-sft": [*models["untied"], *TARGET, "--teacher-hf", workspace / "teacher"],
        "tied psft": [*models["tied"], "--objective", "psft", "--objective-args", "refresh=0"],
        "untied pear": [*models["untied"], "--objective", "pear", "--objective-args", "ratio_low=-2", "ratio_high=1"]
        + ["--teacher-hf", workspace / "teacher"],
        "tied wit": [*models["tied"], "--objective", "wit", "--objective-args", "prompt=0.3", "response=0.8"],
        "tied cft": [*models["tied"], "--objective", "cft", "--objective-args", "denominator=critical"],
        "experts weighted-sft": [*models["experts"], "--objective", "weighted-sft"],
        "latent sft": [*models["latent"]],
        "untied dft": [*models["untied"], "--objective", "dft", "--recompute-activations"],
    }


def test_a_step_of_packed_rows_is_that_of_the_samples_one_by_one(workspace, kinds, rows):
    """The whole file in one step, so that both read the same samples, in another order."""
    assert rows < SAMPLES / 2, "the rows hold several samples"
    one_step = ["--train-iters", 1]
    runs = {}
    for kind, words in kinds.items():
        export = ["--save-hf", workspace / f"{kind}-padded"]
        runs[f"{kind} padded"] = [*words, *one_step, "--global-batch-size", SAMPLES, *export]
        export = ["--save-hf", workspace / f"{kind}-packed"]
        runs[f"{kind} packed"] = [*words, *one_step, "--pack", "--global-batch-size", rows, *export]
    done = launch(1, runs, workspace, timeout=240)
    for kind in kinds:
        padded, packed = (done[f"{kind} {how}"]["scalars"] for how in ("padded", "packed"))
        for tag in (*TAGS, "supervised tokens"):
            limit = 0 if tag == "supervised tokens" else bound(tag, 1)
            assert packed[tag] == pytest.approx(padded[tag], rel=limit, nan_ok=True), (kind, tag)
        folders = (f"{kind}-packed", f"{kind}-padded", kind.split()[0])
        got, want, before = (tensors(workspace / folder) for folder in folders)
        assert update_difference(got, want, before) <= MARGIN * WEIGHTS_FLOOR, kind


def packed(kinds, *extra, batch=4):
    return {kind: [*words, "--pack", "--global-batch-size", batch, *extra] for kind, words in kinds.items()}


def test_layouts_train_packed_rows_like_one_process(workspace, kinds):
    single = launch(1, packed(kinds), workspace, timeout=240)
    runs = packed(kinds)

    def at(layout, kind, *flags):
        return {f"{kind} at {layout}": [*runs[kind], *flags]}

    two = {
        **at("TP2 SP", "untied target-sft", *tp(2), *SEQUENCE_PARALLEL),
        **at("PP2", "untied target-sft", *pp(2)),
        **at("PP2, two rows at a time", "untied target-sft", *pp(2), "--micro-batch-size", 2),
        **at("CP2", "untied target-sft", *CP),
        **at("CP2, two rows at a time", "tied psft", *CP, "--micro-batch-size", 2),
        **at("CP2", "latent sft", *CP),
        **at("CP2, two rows at a time", "untied pear", *CP, "--micro-batch-size", 2),
        **at("CP2", "tied wit", *CP),
        **at("PP2", "tied cft", *pp(2), "--micro-batch-size", 4),
        **at("EP2", "experts weighted-sft", *ep(2), *DISTRIBUTED_OPTIMIZER),
        **at("DP2", "untied dft", *DISTRIBUTED_OPTIMIZER),
        **at("TP2", "tied psft", *tp(2)),
    }
    assert_layouts(launch(2, two, workspace, timeout=400), single)
    four = {
        **at("TP2CP2 SP", "untied target-sft", *tp(2), *SEQUENCE_PARALLEL, *CP),
        **at("PP2 VPP2 TP2 SP", "untied target-sft", *pp(2), *tp(2), *SEQUENCE_PARALLEL) | {},
        **at("PP4, two rows at a time", "untied dft", *pp(4), "--micro-batch-size", 2),
    }
    assert_layouts(launch(4, four, workspace, timeout=400), single)


def test_a_cached_teacher_is_that_of_each_sample(workspace, kinds):
    """With everything kept it is the live one."""
    words = ["--teacher-hf", workspace / "teacher", "--data", workspace / "train.jsonl", "--out", workspace / "cache"]
    words += ["--k", vocabulary(), "--dtype", "float32", "--seq-length", ROW]
    ((code, printed),) = run_ranks(1, run_tool, ("cache_teacher", words), timeout=200, megatron=True)
    assert code == 0, printed[-3000:]
    live = packed({"target-sft": kinds["untied target-sft"]})
    flags = live["target-sft"]
    at = flags.index("--teacher-hf")
    cached = [*flags[:at], "--teacher-cache", workspace / "cache", *flags[at + 2 :]]
    single = launch(1, {**live, "cached": cached}, workspace, timeout=240)
    assert_same_training(single["cached"], single["target-sft"])
    two = {"target-sft at TP2": [*cached, *tp(2)], "target-sft at CP2": [*cached, *CP, "--micro-batch-size", 2]}
    assert_layouts(launch(2, two, workspace, timeout=240), single)


def test_a_training_resumes_in_the_middle_of_an_epoch(workspace, kinds, rows):
    """The rows that follow are those that would have followed, at another layout too."""
    words = packed({"dft": kinds["untied dft"]})["dft"]
    assert 2 * 4 < rows < 4 * 4, "the epoch is neither over where training stops, nor goes on to the end"
    save = ["--save", workspace / "saved", "--save-interval", 2, "--exit-interval", 2]
    whole = launch(1, {"dft": words, "stopped": [*words, *DISTRIBUTED_OPTIMIZER, *save]}, workspace, timeout=240)
    resumed = [*words, *DISTRIBUTED_OPTIMIZER, "--load", workspace / "saved"]
    done = launch(2, {"at DP2": resumed, "at PP2": [*resumed, *pp(2)]}, workspace, timeout=240)
    for name, result in done.items():
        assert_same_training(result, whole["dft"], first_step=2), name


def test_what_is_said_of_rows(workspace, kinds, rows):
    """How full they are; and what cannot be packed is named before anything is built."""
    words = packed({"sft": kinds["untied dft"]})["sft"]
    refused = {
        "--max-tokens-per-row 60 holds no sample of --seq-length 64": ["--max-tokens-per-row", 60],
        "--epochs and --train-iters both say how long to train": ["--epochs", 1],
        "seq_aux_loss balances rows": ["--hf-model", workspace / "experts", "--moe-aux-loss-coeff", 0.1]
        + ["--moe-router-load-balancing-type", "seq_aux_loss"],
    }
    runs = {"said": [*words, "--train-iters", 1]} | {line: [*words, *flags] for line, flags in refused.items()}
    runs = {name: [str(word) for word in flags] for name, flags in runs.items()}
    (done,) = run_ranks(1, run_all, (runs, str(workspace)), timeout=200, megatron=True)
    said = done["said"]["printed"]
    assert f"{SAMPLES} samples share {rows} rows of {ROW} tokens, " in said
    assert f"training reads 4 rows of the {rows} of an epoch" in said
    for line in refused:
        assert done[line]["code"] == 2 and line in done[line]["printed"], done[line]["printed"][-2000:]


def test_a_nan_is_traced_to_the_records_of_its_row(workspace, rows):
    """Of a row the records that are in it, and no padding."""
    (workspace / "spoiled.py").write_text(SPOILED)
    records = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    lines = [json.dumps(record | {"spoiled": int(index == 17)}) for index, record in enumerate(records)]
    (workspace / "spoiled.jsonl").write_text("\n".join(lines))
    words = ["--hf-model", workspace / "untied", "--sft-train", workspace / "spoiled.jsonl", "--seq-length", ROW]
    words += ["--pack", "--global-batch-size", rows, "--train-iters", 1, "--lr", 1e-3]
    words += ["--objective-file", workspace / "spoiled.py", "--objective", "spoiled"]
    with Launch([sys.executable, "-m", "qtarget_megatron.finetune", *words], {}) as launched:
        done = launched.wait(timeout=120)
    (found,) = re.findall(
        r"finetune: error.*the loss of record\(s\) \[([\d, ]+)\] of \S+ \(counted from 0\) is nan", done.stdout
    )
    named = [int(number) for number in found.split(", ")]
    assert done.returncode == 1 and 17 in named and 1 < len(named) < SAMPLES / 3, done.stdout[-2000:]
