"""Trainings whose data come from several sources, by epochs, and with several held-out sets, next to one file."""

import gzip
import json
import math
import re
import sys

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from finetune_runs import SPOILED, run_all, run_tool, vocabulary, write_data, write_models
from launching import Launch, run_ranks
from layout_runs import DISTRIBUTED_OPTIMIZER, assert_same_training, launch, pp, tensors, tp
from noise_floor import MARGIN, WEIGHTS_FLOOR, bound, update_difference
from row_data import sizes_of
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, RowPlan, SampleOrder, aligned_lengths, encode

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

ROW, SEED = 64, 7
# Some samples have more tokens than this.
SHORT = 24
TARGET = ["--objective", "target-sft", "--objective-args", "eta=0.4"]
PACK = ["--pack", "--seq-length", ROW]
CP = ["--context-parallel-size", 2]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    write_models(folder)
    write_data(folder / "a.jsonl", 17, seed=1)
    write_data(folder / "b.jsonl", 23, seed=2)
    (folder / "both.jsonl").write_text((folder / "a.jsonl").read_text() + (folder / "b.jsonl").read_text())
    write_data(folder / "easy.jsonl", 13, seed=3)
    write_data(folder / "hard.jsonl", 5, seed=4)
    for name in ("a", "b"):
        words = [
            "--teacher-hf",
            folder / "teacher",
            "--data",
            folder / f"{name}.jsonl",
            "--out",
            folder / f"cache-{name}",
        ]
        words += ["--k", vocabulary(), "--dtype", "float32", "--seq-length", ROW]
        ((code, printed),) = run_ranks(1, run_tool, ("cache_teacher", words), timeout=200, megatron=True)
        assert code == 0, printed[-3000:]
    return folder


def rows(path, epochs=1.0):
    lengths = sizes_of(JsonlFile(path), byte_tokenizer(CHATML, eos="<|im_end|>"), ROW).tokens.clip(max=ROW)
    return RowPlan(SampleOrder([len(lengths)], seed=SEED), aligned_lengths(lengths, 8), ROW).rows_of(epochs)


def model(workspace, name="untied"):
    return ["--hf-model", workspace / name, *PACK, "--global-batch-size", 4]


def test_several_sources_train_as_one_file_does_with_teachers_of_their_own(workspace):
    one = [*model(workspace), "--sft-train", workspace / "both.jsonl", *TARGET, "--teacher-hf", workspace / "teacher"]
    two = [*model(workspace), "--sft-train", workspace / "a.jsonl", workspace / "b.jsonl", *TARGET]
    cached = [*two, "--teacher-cache", workspace / "cache-a", workspace / "cache-b"]
    live = [*two, "--teacher-hf", workspace / "teacher"]
    # The same records in other files.
    with gzip.open(workspace / "a.jsonl.gz", "wb") as file:
        file.write((workspace / "a.jsonl").read_bytes())
    (workspace / "b").mkdir()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in (workspace / "b.jsonl").read_text().splitlines()])
    for name, begin in (("0.parquet", 0), ("1.parquet", 10)):
        pyarrow.parquet.write_table(table.slice(begin, 10 if begin == 0 else None), workspace / "b" / name)
    others = [workspace / "a.jsonl.gz", workspace / "b", *TARGET, "--teacher-hf", workspace / "teacher"]
    others = [*model(workspace), "--sft-train", *others]
    runs = {"one": one, "live": live, "cached": cached, "others": others}
    found = launch(1, runs, workspace, timeout=240)
    for name in ("live", "cached", "others"):
        assert_same_training(found[name], found["one"])
    sharded = launch(2, {"TP2": [*cached, *tp(2)], "DP2": [*cached, *DISTRIBUTED_OPTIMIZER]}, workspace, timeout=240)
    for result in sharded.values():
        assert_same_training(result, found["one"])


def test_weights_choose_how_much_of_each_source_is_read(workspace):
    """One epoch with a source that alone has supervised tokens of its own number: its share of all."""
    for name, answer in (("short", "1"), ("long", "1" * 20)):
        records = [{"prompt": "2 =", "completion": answer}] * 10
        (workspace / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    words = ["--hf-model", workspace / "untied", "--seq-length", ROW, "--no-pack", "--global-batch-size", 20]
    words += ["--train-iters", 2]
    weighted = {
        share: [*words, "--sft-train", f"{workspace}/short.jsonl:{share}", f"{workspace}/long.jsonl:{10 - share}"]
        for share in (1, 8)
    }
    found = launch(1, {f"share {share}": flags for share, flags in weighted.items()}, workspace, timeout=200)
    for share in weighted:
        short, long = 2 * share, 20 - 2 * share  # of 20 samples an epoch
        expected = short * (1 + 1) + long * (20 + 1)  # with the end of the sequence
        assert found[f"share {share}"]["scalars"]["supervised tokens"] == [expected] * 2


def test_epochs_say_how_many_steps_there_are(workspace):
    data = workspace / "both.jsonl"
    common = [*model(workspace), "--sft-train", data, "--train-iters"]  # the last word is replaced
    counted = [word for word in common if word != "--train-iters"]
    drawn = {epochs: math.ceil(rows(data, epochs) / 4) for epochs in (1, 2.5)}
    assert drawn[1] < drawn[2.5]
    save = ["--save", workspace / "saved", "--save-interval", 100]
    schedule = ["--lr-decay-style", "cosine", "--min-lr", 1e-4, "--lr-warmup-fraction", 0.25]
    runs = {
        "1": [*counted, "--epochs", 1, *save],
        "2.5": [*counted, "--epochs", 2.5, *schedule],
        "as steps": [*counted, "--train-iters", drawn[2.5], *schedule],
        "a part": [*counted, "--epochs", 0.01],
    }
    # TRAIN_ITERS is among the common flags of these runs.
    results = run_epochs(1, runs, workspace)
    assert f"--epochs 2.5: {rows(data, 2.5)} rows in steps of 4: {drawn[2.5]} steps" in results["2.5"]["printed"]
    for epochs in (1, 2.5):
        assert len(results[f"{epochs:g}"]["scalars"]["lm loss"]) == drawn[epochs]
    assert len(results["a part"]["scalars"]["lm loss"]) == 1
    for tag in ("learning-rate", "lm loss", "row fill"):
        assert results["2.5"]["scalars"][tag] == results["as steps"]["scalars"][tag]
    # One goes on to the end of another number of epochs, at another layout, and once more to no step at all.
    out = workspace / "exported"
    more = [*counted, "--epochs", 2.5, *save, "--load", workspace / "saved", *DISTRIBUTED_OPTIMIZER]
    more = [*more, "--no-load-optim", "--save-hf", out]
    again = run_epochs(2, {"on": more, "again": more}, workspace)
    assert len(again["on"]["scalars"]["lm loss"]) == drawn[2.5] - drawn[1]
    assert "nothing is left to do" in again["again"]["printed"] and again["again"]["code"] == 0
    assert len(tensors(out)) > 0


def run_epochs(ranks, runs, workspace):
    runs = {name: [str(word) for word in words] for name, words in runs.items()}
    results = run_ranks(ranks, run_without_steps, (runs, str(workspace)), timeout=300, megatron=True)
    for name, result in results[-1].items():
        result["printed"] = results[0][name]["printed"]  # what the first rank says
    for outcome in results:
        for name, result in outcome.items():
            assert result["code"] in (0, None), f"{name}: {result['printed'][-3000:]}"
    return results[-1]


def run_without_steps(runs, folder):
    """run_all without its own --train-iters."""
    from finetune_runs import COMMON

    at = COMMON.index("--train-iters")
    return run_all(runs, folder, common=[*COMMON[:at], *COMMON[at + 2 :]])


@pytest.fixture(scope="module")
def truth(workspace):
    """Mean -log p(y) over the supervised tokens of each held-out set, by transformers in float64."""
    network = transformers.AutoModelForCausalLM.from_pretrained(workspace / "untied", dtype=torch.float64)
    tokenizer, found = byte_tokenizer(CHATML, eos="<|im_end|>"), {}
    for name in ("easy", "hard"):
        total, count = 0.0, 0
        for line in (workspace / f"{name}.jsonl").read_text().splitlines():
            sample = encode(tokenizer, json.loads(line), ROW)
            ids = torch.tensor(sample.input_ids)
            with torch.no_grad():
                log_p = network(ids[None, :-1]).logits[0].log_softmax(-1)
            supervised = torch.tensor(sample.supervised[1:])
            total -= log_p.gather(1, ids[1:, None])[supervised].sum().item()
            count += int(supervised.sum())
        found[name] = total / count
    return found


def test_held_out_sets_are_evaluated_as_a_whole_each_by_its_name(workspace, truth):
    """Before any step: every sample once, at every layout, in packed rows and in rows of their own."""
    sets = [f"first={workspace}/easy.jsonl", workspace / "hard.jsonl"]
    words = [*model(workspace), "--skip-train", "--sft-valid"]

    def check(results, printed=None):
        for name, result in results.items():
            scalars = result["printed"]
            if name.startswith("one"):
                found = {"easy": evaluated(scalars, "")}
            else:
                found = {"easy": evaluated(scalars, " first"), "hard": evaluated(scalars, " hard")}
            for held_out, value in found.items():
                assert value == pytest.approx(truth[held_out], rel=bound("lm loss", 1)), (name, held_out)

    one, both = [*words, workspace / "easy.jsonl"], [*words, *sets]
    check(launch(1, {"one": one, "one, a sample a row": [*one, "--no-pack"], "both": both}, workspace, timeout=240))
    two = {
        "one at DP2": one,
        "one at CP2": [*one, *CP],
        "both at DP2": both,
        "both at DP2, a sample a row": [*both, "--no-pack", "--micro-batch-size", 2],
        "both at PP2": [*both, *pp(2), "--micro-batch-size", 2],
        "both at VPP2": [*both, *pp(2), *VPP2],
        "one at TP2": [*one, *tp(2), "--sequence-parallel"],
    }
    check(launch(2, two, workspace, timeout=400))


def test_a_set_among_others_has_the_loss_that_it_has_alone(workspace):
    """Objectives that divide by a number of tokens of their own, and one that reads a cached teacher."""
    kinds = {
        "cft": ["--objective", "cft", "--objective-args", "denominator=critical"],
        "mask": ["--objective", "entropy-mask", "--objective-args", "threshold=5.38", "denominator=kept"],
        "iw": ["--objective", "weighted-sft", "--micro-batch-size", 2],
    }
    cached = ["--teacher-cache-valid", workspace / "cache-a", workspace / "cache-b"]
    for name, words in kinds.items():
        kinds[name] = [*model(workspace), "--skip-train", *words]
    sets = {name: workspace / f"{name}.jsonl" for name in ("a", "b")}
    runs = {
        f"{kind} {name}": [*words, "--sft-valid", path] for kind, words in kinds.items() for name, path in sets.items()
    }
    target = [*model(workspace), "--skip-train", *TARGET, "--sft-valid"]
    runs |= {f"target {name}": [*target, sets[name], *cached[:1], workspace / f"cache-{name}"] for name in sets}
    both = {kind: [*words, "--sft-valid", *sets.values()] for kind, words in kinds.items()}
    both["target"] = [*target, *sets.values(), *cached]
    alone = launch(1, runs, workspace, timeout=240)
    for ranks, flags in ((1, []), (2, CP)):
        for kind, result in launch(ranks, {k: [*w, *flags] for k, w in both.items()}, workspace, timeout=240).items():
            for name in sets:
                expected = evaluated(alone[f"{kind} {name}"]["printed"], "")
                found = evaluated(result["printed"], f" {name}")
                assert found == pytest.approx(expected, rel=bound("lm loss", 1)), (kind, name)


def evaluated(printed, suffix):
    found = re.findall(rf"validation loss at .*?\| lm loss{suffix} value: (\S+) \|", printed)
    assert found, printed[-2000:]
    return float(found[-1])


def test_a_longer_row_and_long_samples(workspace):
    """Rows of more tokens than a sample may have; samples that are too long are cut, left out, or refused."""
    data = ["--hf-model", workspace / "untied", "--sft-train", workspace / "both.jsonl", "--train-iters", 1]
    padded = [*data, "--no-pack", "--seq-length", ROW, "--global-batch-size", 40]
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    lengths = aligned_lengths(sizes_of(JsonlFile(workspace / "both.jsonl"), tokenizer, ROW).tokens.clip(max=ROW), 8)
    many = len(RowPlan(SampleOrder([40], seed=SEED), lengths, 200).epoch(0))
    long = [*data, "--pack", "--seq-length", ROW, "--max-tokens-per-row", 200, "--global-batch-size", many]
    cut = sizes_of(JsonlFile(workspace / "both.jsonl"), tokenizer, SHORT)
    short = int(((cut.supervised > 0) & ~cut.truncated).sum())
    assert 0 < short < 40
    left_out = [*data, "--no-pack", "--seq-length", SHORT, "--long-samples", "skip", "--global-batch-size", short]
    runs = {"padded": [*padded, "--save-hf", workspace / "padded"], "long": [*long, "--save-hf", workspace / "long"]}
    found = launch(1, {**runs, "skip": left_out}, workspace, timeout=240)
    for tag in ("lm loss", "supervised tokens"):
        assert found["long"]["scalars"][tag] == pytest.approx(found["padded"]["scalars"][tag], rel=bound("lm loss", 1))
    got, want, before = (tensors(workspace / name) for name in ("long", "padded", "untied"))
    assert update_difference(got, want, before) <= MARGIN * WEIGHTS_FLOOR
    supervised = int(cut.supervised[~cut.truncated].sum())
    assert found["skip"]["scalars"]["supervised tokens"] == pytest.approx([supervised], rel=1e-6)  # float32
    assert f"{int(cut.truncated.sum())} skipped (more than {SHORT} tokens)" in found["skip"]["printed"]
    assert found["long"]["scalars"]["row fill"][0] > 2 * found["padded"]["scalars"]["row fill"][0]

    refused = [*data, "--pack", "--seq-length", SHORT, "--long-samples", "refuse", "--global-batch-size", 4]
    result = launch_alone(refused)
    (line,) = re.findall(r"finetune: error.*", result.stdout)
    first = int(cut.truncated.argmax()) + 1
    assert (
        f"both.jsonl:{first}: the record has more than --seq-length {SHORT} tokens" in line and result.returncode == 2
    )


def launch_alone(words):
    with Launch([sys.executable, "-m", "qtarget_megatron.finetune", "--lr", 1e-3, *words], {}) as launched:
        return launched.wait(timeout=120)


def test_a_nan_is_traced_to_the_record_and_its_source(workspace):
    (workspace / "spoiled.py").write_text(SPOILED)
    for name, bad in (("a", None), ("b", 3)):
        records = [json.loads(line) for line in (workspace / f"{name}.jsonl").read_text().splitlines()]
        lines = [json.dumps(record | {"spoiled": int(index == bad)}) for index, record in enumerate(records)]
        (workspace / f"spoiled-{name}.jsonl").write_text("\n".join(lines))
    words = ["--hf-model", workspace / "untied", "--no-pack", "--seq-length", ROW, "--global-batch-size", 40]
    words += ["--train-iters", 1, "--objective-file", workspace / "spoiled.py", "--objective", "spoiled"]
    sources = [workspace / "spoiled-a.jsonl", workspace / "spoiled-b.jsonl"]
    done = launch_alone([*words, "--sft-train", *sources])
    assert done.returncode == 1
    assert f"the loss of record(s) [3] of {sources[1]} (counted from 0) is nan" in done.stdout, done.stdout[-2000:]
