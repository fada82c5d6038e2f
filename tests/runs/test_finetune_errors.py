"""Bad input to finetune: one clear line, exit code 2, and nothing written."""

import argparse
import itertools
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
from finetune_runs import COMMON, run_all, write_data, write_models
from launching import REPOSITORY, run_ranks
from small_tokenizers import CHATML, SPECIAL, byte_tokenizer

from qtarget_megatron import output_lock
from qtarget_megatron.command_line import SYNONYMS, Parser
from qtarget_megatron.megatron.training.arguments import add_arguments, check_numbers

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    write_models(folder)
    write_data(folder / "train.jsonl", 12, seed=1)
    lines = (folder / "train.jsonl").read_text().splitlines()
    (folder / "no-json.jsonl").write_text("\n".join([*lines[:6], "{'role': 1}", *lines[6:]]))
    (folder / "no-keys.jsonl").write_text("\n".join([*lines[:3], '{"text": "hello"}']))
    records = [json.loads(line) for line in lines]
    bare = [{"messages": record["messages"]} for record in records]
    write_records(folder / "no-side-inputs.jsonl", bare)
    write_records(folder / "short-side-input.jsonl", [*records[:4], records[4] | {"critical": [1]}, *records[5:]])
    write_records(folder / "mixed.jsonl", [*records[:3], {"instruction": "a", "output": "b"}])
    weighed = [*bare[2]["messages"][:1], bare[2]["messages"][1] | {"weight": 0.5}]
    write_records(folder / "weighed.jsonl", [*records[:2], {"messages": weighed}])
    weighted = [turn | ({"weight": 0.5} if turn["role"] == "assistant" else {}) for turn in records[1]["messages"]]
    write_records(folder / "weighted.jsonl", [bare[0], {"messages": weighted}])
    (folder / "blank.jsonl").write_text("\n\n")
    write_records(folder / "nan.jsonl", [records[0], records[1] | {"weight": float("nan")}])
    (folder / "broken.py").write_text("x = 1\nx / 0\n")
    (folder / "empty.py").write_text("")
    (folder / "full").mkdir()
    (folder / "full" / "precious.txt").write_text("keep me")

    variant(folder, "unknown", architectures=["MambaForCausalLM"], model_type="mamba")
    variant(folder, "small-vocabulary", vocab_size=200)
    (folder / "used").mkdir()
    (folder / "used" / "latest_checkpointed_iteration.txt").write_text("7")
    variant(folder, "heads12", num_attention_heads=12, num_key_value_heads=4, hidden_size=48, head_dim=4)
    variant(folder, "larger-vocabulary", source="teacher", vocab_size=400)
    shard = folder / variant(folder, "truncated") / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    tokenizer = folder / variant(folder, "linked") / "tokenizer.json"
    tokenizer.rename(folder / "elsewhere.json")
    tokenizer.symlink_to(folder / "elsewhere.json")
    output_lock.claim(folder / "in-use" / ".lock", "it")
    (folder / variant(folder, "no-weights") / "model.safetensors").unlink()
    shutil.copytree(folder / "teacher", folder / "other-tokenizer")
    byte_tokenizer(CHATML, eos="<|im_end|>", special=SPECIAL[::-1]).save_pretrained(folder / "other-tokenizer")
    yield folder
    output_lock.release_all()


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def variant(folder, name, source="untied", **changes):
    shutil.copytree(folder / source, folder / name)
    path = folder / name / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return name


# name: (changes of a correct command line; None drops a flag), pieces of the message: expected, actual, what to do.
CASES = {
    "unknown objective": ({"--objective": "sftt"}, ["'sftt'", "target-sft"]),
    "unknown objective argument": (
        {"--objective": "dft", "--objective-args": "eta=1"},
        ["'eta'", "dft", "none"],
    ),
    "objective argument out of range": ({"--objective-args": "lam=1.5"}, ["lam", "[0, 1]", "1.5"]),
    "objective argument without value": ({"--objective-args": "lam"}, ["KEY=VALUE", "'lam'"]),
    "teacher missing": ({"--objective": "kd", "--objective-args": None}, ["kd", "--teacher-hf", "--teacher-cache"]),
    "teacher superfluous": ({"--teacher-hf": "teacher"}, ["label-smoothing", "drop --teacher-hf"]),
    "teacher's checkpoint without its config": (
        {"--teacher-load": "used"},
        ["--teacher-load", "used", "--teacher-hf DIR"],
    ),
    "teacher's checkpoint absent": (
        {"--objective": "kd", "--objective-args": None, "--teacher-hf": "teacher", "--teacher-load": "absent"},
        ["--teacher-load", "absent", "torch_dist"],
    ),
    "teacher with another tokenizer": (
        {"--objective": "kd", "--objective-args": None, "--teacher-hf": "other-tokenizer"},
        ["vocabularies differ", "id 304"],
    ),
    "teacher whose config and weights disagree": (
        {"--objective": "kd", "--objective-args": None, "--teacher-hf": "larger-vocabulary"},
        ["400", "model.embed_tokens.weight"],
    ),
    "objective that is another one on other data": (
        {"--objective": "gkd", "--objective-args": None},
        ["'gkd'", "not available", "jsd"],
    ),
    "gem's other form": (
        {"--objective": "gem", "--objective-args": "h=logsigmoid"},
        ["gem(h='logsigmoid')", "not available", "h='linear'"],
    ),
    "a teacher in the place of the model of an earlier step": (
        {"--objective": "psft", "--objective-args": None, "--teacher-hf": "teacher"},
        ["psft(", "the trained model as it was up to 8 steps ago", "drop --teacher-hf"],
    ),
    "a format that does not keep the model of an earlier step": (
        {"--objective": "psft", "--objective-args": None, "--ckpt-format": "torch"},
        ["psft(", "--ckpt-format torch would not save", "drop the flag"],
    ),
    "side input missing": (
        {"--objective": "psft", "--objective-args": "refresh=0", "--sft-train": "no-side-inputs.jsonl"},
        ["no-side-inputs.jsonl:1", '"old_log_prob"', "qtarget score"],
    ),
    "side input of another length": (
        {"--objective": "cft", "--objective-args": None, "--sft-train": "short-side-input.jsonl"},
        ["short-side-input.jsonl:5", '"critical"', "got 1"],
    ),
    "side input that is no number": (
        {"--objective": "weighted-sft", "--objective-args": None, "--sft-train": "nan.jsonl"},
        ["nan.jsonl:2", '"weight"', "finite number", "NaN"],
    ),
    "a weight that the objective does not read": (
        {"--sft-train": "weighted.jsonl"},
        ["weighted.jsonl:2", '"weight"', "neither 0 nor 1", "weighted-sft"],
    ),
    "a source of no weight": ({"--sft-train": "train.jsonl:0"}, ["train.jsonl:0", "a weight above 0, got 0"]),
    "a source that is gone": ({"--sft-train": "gone.jsonl:2"}, ["gone.jsonl'", "No such file"]),
    "a source that is empty": ({"--sft-train": "blank.jsonl"}, ["blank.jsonl", "holds no records"]),
    "held-out data that are gone": ({"--sft-valid": "name=gone.jsonl"}, ["gone.jsonl", "No such file"]),
    "heads of a hybrid model": (
        {"--model-class": "hybrid", "--mtp-num-layers": 1},
        ["--mtp-num-layers", "--model-class gpt"],
    ),
    "a pattern of layers": ({"--model-class": "hybrid", "--hybrid-layer-pattern": "*-*-"}, ["--hybrid-layer-pattern"]),
    "epochs and steps": ({"--epochs": 2}, ["--epochs", "--train-iters", "drop one of them"]),
    "no epochs": ({"--epochs": 0, "--train-iters": None}, ["--epochs", "above 0, got 0"]),
    "a warm-up that is longer than the epochs": (
        {"--epochs": 1, "--train-iters": None, "--lr-warmup-iters": 400},
        ["--lr-warmup-iters 400", "shorter warm-up"],
    ),
    "rows that hold no sample": (
        {"--max-tokens-per-row": 16},
        ["--max-tokens-per-row 16", "--seq-length 32"],
    ),
    "samples longer than a row, not to be cut": (
        {"--long-samples": "refuse", "--seq-length": 16},
        ["train.jsonl:", "more than --seq-length 16", "cut or skip"],
    ),
    "rows that cannot be packed": (
        {"--moe-router-load-balancing-type": "seq_aux_loss"},
        ["seq_aux_loss", "--no-pack"],
    ),
    "held-out sets in Megatron's words": (
        {"--validation-set-names": "one"},
        ["--sft-valid NAME=FILE"],
    ),
    "caches for other sources": (
        {"--objective": "kd", "--objective-args": None, "--teacher-cache": "used", "--sft-train": None},
        ["--sft-train"],
    ),
    "objective file absent": ({"--objective-file": "absent.py"}, ["absent.py", "expected a Python file"]),
    "objective file that fails": ({"--objective-file": "broken.py"}, ["broken.py:2", "ZeroDivisionError"]),
    "objective file that registers nothing": (
        {"--objective-file": "empty.py"},
        ["empty.py", "registers no objective", "@objectives.register"],
    ),
    "chunks of no tokens": ({"--qtarget-chunk-size": 0}, ["--qtarget-chunk-size", "1 or more", "0"]),
    "chunks of some other size": (
        {"--qtarget-chunk-size": "many"},
        ["--qtarget-chunk-size: expected auto or a number of tokens, got 'many'"],
    ),
    "TP that does not divide the heads": (
        {"--tensor-model-parallel-size": 3},
        ["3", "4 attention heads", "[1, 2, 4]"],
    ),
    "TP that does not fit the key/value heads": (
        {"--hf-model": "heads12", "--tensor-model-parallel-size": 6},
        ["6", "4 key/value heads", "[1, 2, 4, 12]"],
    ),
    "PP that does not divide the layers": (
        {"--pipeline-model-parallel-size": 3},
        ["3", "4 layers"],
    ),
    "sequence longer than the positions": ({"--seq-length": 4096}, ["4096", "64 positions"]),
    "flag that the model decides": ({"--num-layers": 2}, ["--num-layers", "config.json"]),
    "Megatron's data path": ({"--data-path": "x"}, ["--data-path", "--sft-train"]),
    "learning rate missing": ({"--lr": None}, ["--lr", "missing"]),
    "flags that Megatron refuses": (
        {"--pipeline-model-parallel-size": 2},
        ["Megatron", "world size (1)"],
    ),
    "steps to leave out at TP2": (
        {"--iterations-to-skip": 3, "--tensor-model-parallel-size": 2},
        ["--iterations-to-skip", "--tensor-model-parallel-size 1", "got 2"],
    ),
    "NaN to skip with an optimizer that cannot": (
        {"--qtarget-on-nan": "skip"},
        ["--qtarget-on-nan skip", "float32 optimizer", "--use-distributed-optimizer"],
    ),
    "flags of another trainer": (
        {"--learning-rate": 1e-4, "--num-epochs": 3},
        [
            "unknown flags --learning-rate (did you mean --lr?)",
            "--num-epochs (did you mean --epochs",
        ],
    ),
    # Megatron would take it for a flag that is not given.
    "micro-batch of no samples": ({"--micro-batch-size": 0}, ["--micro-batch-size: expected 1 or more, got 0"]),
    "learning rate without end": ({"--lr": "inf"}, ["--lr: expected a number of 0 or more, got inf"]),
    "batch that ranks cannot share": (
        {"--global-batch-size": 3, "--micro-batch-size": 2},
        ["--global-batch-size 3 cannot be shared by 1 data-parallel rank(s)", "a multiple of 2, as 2"],
    ),
    "flag that needs a GPU": ({"--cuda-graph-impl": "local"}, ["--cuda-graph-impl needs a GPU", "drop it"]),
    "value of another kind": ({"--train-iters": "many"}, ["--train-iters", "invalid int value: 'many'"]),
    "value of another kind, ours": ({"--teacher-tail": "long"}, ["--teacher-tail", "'long'", "uniform"]),
    "no training data": ({"--sft-train": None}, ["--sft-train"]),
    "training data absent": ({"--sft-train": "absent.jsonl"}, ["absent.jsonl"]),
    "line that is no JSON": ({"--sft-train": "no-json.jsonl"}, ["no-json.jsonl:7", "JSON"]),
    "line without the keys": ({"--sft-train": "no-keys.jsonl"}, ["no-keys.jsonl:4", "messages"]),
    "record of another form": (
        {"--sft-train": "mixed.jsonl"},
        ["mixed.jsonl:4", "the form messages", "got the form alpaca", "split the file", "convert it"],
    ),
    "another form than is said": (
        {"--data-format": "sharegpt"},
        ["train.jsonl:1", "the form sharegpt", "--data-format", "got the form messages"],
    ),
    "weight of an answer that the objective does not read": (
        {"--sft-train": "weighed.jsonl"},
        ["weighed.jsonl:3", '"weight"', "neither 0 nor 1", "weighted-sft", "weights 0 and 1"],
    ),
    "model directory absent": ({"--hf-model": "absent"}, ["absent"]),
    "model directory without weights": (
        {"--hf-model": "no-weights"},
        ["no-weights", "safetensors"],
    ),
    "truncated shard": ({"--hf-model": "truncated"}, ["model.safetensors", "bytes"]),
    "unsupported architecture": (
        {"--hf-model": "unknown"},
        ["MambaForCausalLM", "LlamaForCausalLM"],
    ),
    "output directory not empty": ({"--save-hf": "full"}, ["full", "empty"]),
    "checkpoint in the way": ({"--save": "used"}, ["--save", "used", "--load", "another"]),
    "checkpoints into a file": ({"--save": "train.jsonl"}, ["--save", "train.jsonl", "got a file"]),
    "checkpoints below a file": ({"--save": "train.jsonl/checkpoints"}, ["--save", "Not a directory"]),
    "checkpoints of another process": ({"--save": "in-use"}, ["--save", "in-use", "is being written by process"]),
    "export where nothing can be written": ({"--save-hf": "/proc/exported"}, ["/proc/exported", "cannot be written"]),
    "tokenizer that lies elsewhere": ({"--hf-model": "linked"}, ["tokenizer.json", "link to", "cp -rL"]),
    "tokenizer of another model": ({"--hf-model": "small-vocabulary"}, ["tokenizer", "200"]),
    "checkpoint absent": ({"--load": "absent"}, ["--load", "absent", "drop"]),
}
PATHS = ("--hf-model", "--teacher-hf", "--teacher-load", "--sft-train", "--save-hf", "--load", "--objective-file")


def command_line(workspace, changes):
    flags = (
        dict(itertools.batched((word for word in COMMON if word != "--no-pack"), 2))
        | {
            "--hf-model": "untied",
            "--sft-train": "train.jsonl",
            "--objective": "label-smoothing",
            "--objective-args": "lam=0.1",
            "--save": "checkpoint",
            "--save-hf": "exported",
        }
        | changes
    )
    words = []
    for flag, value in flags.items():
        if value is not None:
            words += [flag, str(workspace / value) if flag in (*PATHS, "--save") else str(value)]
    return words


@pytest.fixture(scope="module")
def outcomes(workspace):
    runs = {name: command_line(workspace, changes) for name, (changes, _) in CASES.items()}
    return run_ranks(1, run_all, (runs, str(workspace), []), timeout=240, megatron=True)[0]


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_clear_line(outcomes, workspace, name):
    result = outcomes[name]
    assert result["code"] == 2, result["printed"][-2000:]
    errors = [line for line in result["printed"].splitlines() if line.startswith("finetune: error: ")]
    assert len(errors) == 1, result["printed"][-2000:]
    for piece in CASES[name][1]:
        assert piece in errors[0], errors[0]
    assert "Traceback" not in result["printed"]
    assert not (workspace / "checkpoint").exists() and not (workspace / "exported").exists()
    assert [path.name for path in (workspace / "full").iterdir()] == ["precious.txt"]


NUMBERS = dict.fromkeys(
    (
        *("train_iters", "train_samples", "micro_batch_size", "global_batch_size", "seq_length", "save_interval"),
        *("eval_interval", "log_interval", "tensor_model_parallel_size", "pipeline_model_parallel_size"),
        *("context_parallel_size", "expert_model_parallel_size", "mtp_num_layers"),
    )
)


@pytest.mark.parametrize("key", NUMBERS)
def test_a_number_that_is_none_is_refused(key):
    given = NUMBERS | {"lr": 1e-3, "skip_train": False}
    check_numbers(argparse.Namespace(**given))
    check_numbers(argparse.Namespace(**given | {key: 1}))
    for value in (0, -1):
        with pytest.raises(ValueError, match=f"^--{key.replace('_', '-')}: expected 1 or more, got {value}"):
            check_numbers(argparse.Namespace(**given | {key: value}))
    if key.startswith("train"):
        # Where nothing is trained it is no advice to say so.
        check_numbers(argparse.Namespace(**given | {key: 0, "skip_train": True}))


@pytest.mark.parametrize("rate", [-1e-9, math.inf, math.nan])
def test_a_learning_rate_that_is_none_is_refused(rate):
    given = NUMBERS | {"skip_train": False}
    check_numbers(argparse.Namespace(**given, lr=0.0))
    with pytest.raises(ValueError, match=f"^--lr: expected a number of 0 or more, got {rate}"):
        check_numbers(argparse.Namespace(**given, lr=rate))


def test_the_command_exits_with_2_and_prints_the_line(workspace):
    words = command_line(workspace, {"--objective": "nonsense"})
    command = [sys.executable, "-m", "qtarget_megatron.finetune", *words]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert result.returncode == 2
    assert "finetune: error: unknown objective 'nonsense'" in result.stderr


def test_help_megatron_lists_its_flags():
    command = [sys.executable, "-m", "qtarget_megatron.finetune", "--help-megatron"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0, result.stderr[-2000:]
    for flag in ("--tensor-model-parallel-size", "--save-interval", "--lr-warmup-iters"):
        assert flag in result.stdout
    # What flags of other trainers are called here exists, and they do not.
    known = set(re.findall(r"--[a-z0-9-]+", result.stdout)) | set(add_arguments(Parser())._option_string_actions)
    assert {flag for here in SYNONYMS.values() for flag in here} <= known
    others = [f"--{name}" for names in SYNONYMS for name in names]
    assert len(others) == len(set(others)) and not known.intersection(others)


def test_help_explains_the_arguments_without_a_model():
    command = [sys.executable, "-m", "qtarget_megatron.finetune", "--help"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0
    for flag in (
        "--hf-model",
        "--objective",
        "--teacher-hf",
        "--save-hf",
        "--help-megatron",
        "torchrun",
    ):
        assert flag in result.stdout
