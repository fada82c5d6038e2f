"""Parallel layouts, pairwise: each trains the same model as one process, step by step and in what it exports."""

import itertools

import pytest
import torch
from finetune_runs import vocabulary, write_data, write_model
from layout_matrix import covering
from layout_runs import launch, pp, tensors, tp
from noise_floor import FAST, MARGIN, TAGS, WEIGHTS_FLOOR, bound, update_difference

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 4
# Bounds of a layout against one process, relative. float32: noise_floor.py. bfloat16: tensor parallelism rounds each
# rank's part of a sum to 8 bits before they are added; without it the bits are those of one process.
HALF = 2.0**-8
BFLOAT16 = dict.fromkeys(TAGS, 4 * HALF) | {"lm loss": HALF, "grad-norm": 8 * HALF}
FACTORS = {
    "TP": (1, 2, 4),
    "PP": (1, 2),
    "VPP": (1, 2),
    "DP": (1, 2),
    "CP": (1, 2),
    "EP": (1, 2),
    "sequence parallel": (False, True),
    "distributed optimizer": (False, True),
    "packed": (False, True),
    "dtype": ("float32", "bfloat16"),
    "student": ("untied", "tied", "experts"),
    "teacher": (False, True),
    "class": ("gpt", "hybrid"),
}


def world_size(row):
    return row["TP"] * row["PP"] * row["DP"] * row["CP"]


def possible(row):
    if not 1 < world_size(row) <= 8 or row["VPP"] > row["PP"]:
        return False
    if row["sequence parallel"] and row["TP"] == 1:
        return False
    if row["student"] != "experts":
        return row["EP"] == 1
    # Megatron trains experts under tensor parallelism with sequence parallelism only.
    return (row["TP"] == 1 or row["sequence parallel"]) and row["EP"] <= row["TP"] * row["DP"]


ROWS = covering(FACTORS, possible, world_size)
# In float32 as well, where the bounds are sharp.
ROWS += [row | {"dtype": "float32"} for row in ROWS if row["dtype"] != "float32"]
SIZES = dict(max_position_embeddings=64, num_attention_heads=4, num_hidden_layers=4)
OPTIONS = ["--micro-batch-size", 2, "--train-iters", STEPS, "--lr", FAST, "--min-lr", FAST]
OPTIONS += ["--save-hf-dtype", "float32"]
EXPERTS = dict(hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=16, moe_intermediate_size=24)
EXPERTS |= dict(num_local_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
STUDENTS = {
    "untied": ("Llama", dict(hidden_size=32, intermediate_size=48)),
    "tied": (
        "Qwen3",
        dict(hidden_size=32, intermediate_size=48, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True),
    ),
    "experts": ("Qwen3Moe", EXPERTS),
    # Where scores are rounded, two experts may change places, and a token's whole gradient moves: no bound would hold.
    "every expert": ("Qwen3Moe", EXPERTS | dict(num_experts_per_tok=4)),
}


def student(row):
    return "every expert" if row["student"] == "experts" and row["dtype"] == "bfloat16" else row["student"]


def kind(row):
    """What one process has to train to be compared with a row; a GPTModel, whichever class the row has."""
    packed = ", packed" if row["packed"] else ""
    return f"{student(row)} {'target-sft' if row['teacher'] else 'sft'} in {row['dtype']}{packed}"


def name(row):
    degrees = "".join(f"{key}{row[key]}" for key in ("TP", "PP", "VPP", "DP", "CP", "EP") if row[key] > 1)
    more = (key for key in ("sequence parallel", "distributed optimizer") if row[key])
    return " ".join([row["class"], kind(row), "at", degrees, *more])


def words(workspace, row):
    flags = ["--hf-model", workspace / student(row), "--sft-train", workspace / "train.jsonl"]
    if row["teacher"]:
        flags += ["--objective", "target-sft", "--objective-args", "eta=0.4", "--teacher-hf", workspace / "teacher"]
    else:
        flags += ["--objective", "sft"]
    flags += ["--pack", "--seq-length", 64] if row["packed"] else []
    return flags + (["--bf16"] if row["dtype"] == "bfloat16" else []) + OPTIONS


def layout(row):
    flags = [*tp(row["TP"]), *pp(row["PP"]), "--context-parallel-size", row["CP"], "--model-class", row["class"]]
    if row["VPP"] > 1:
        flags += ["--num-virtual-stages-per-pipeline-rank", row["VPP"]]
    if row["student"] == "experts":
        # Where there are no data-parallel ranks, the tensor-parallel ones share the experts, each of which is whole.
        flags += ["--expert-model-parallel-size", row["EP"]]
        flags += ["--expert-tensor-parallel-size", 1] if row["DP"] == 1 and row["EP"] > 1 else []
    if row["sequence parallel"]:
        flags += ["--sequence-parallel"]
    if row["distributed optimizer"]:
        flags += ["--use-distributed-optimizer"]
    return flags


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("layouts")
    generator = torch.Generator().manual_seed(23)
    teacher = dict(hidden_size=48, intermediate_size=64, tie_word_embeddings=True, num_hidden_layers=2)
    for path, (family, sizes) in {**STUDENTS, "teacher": ("Llama", teacher)}.items():
        write_model(folder / path, family, dict(vocab_size=vocabulary()) | SIZES | sizes, generator)
    write_data(folder / "train.jsonl", 40, seed=3)
    return folder


@pytest.fixture(scope="module")
def single(workspace):
    kinds = {kind(row): words(workspace, row) for row in ROWS}
    return launch(1, {key: [*flags, "--save-hf", workspace / key] for key, flags in kinds.items()}, workspace, 240)


@pytest.mark.parametrize("size", sorted({world_size(row) for row in ROWS}))
def test_a_layout_trains_like_one_process(workspace, single, size):
    rows = {name(row): row for row in ROWS if world_size(row) == size}
    runs = {key: [*words(workspace, row), *layout(row), "--save-hf", workspace / key] for key, row in rows.items()}
    results = launch(size, runs, workspace, timeout=600)
    for key, row in rows.items():
        try:
            assert_like(results[key], single[kind(row)], row["dtype"])
            assert_same_weights(workspace, key, row)
        except AssertionError as error:
            raise AssertionError(f"{key}: {error}") from error


def assert_like(result, expected, dtype):
    assert result["scalars"]["supervised tokens"] == expected["scalars"]["supervised tokens"]
    for tag in TAGS:
        got, want = result["scalars"][tag], expected["scalars"][tag]
        assert len(got) == STEPS, tag
        for step, (a, b) in enumerate(zip(got, want, strict=True), 1):
            limit = bound(tag, step, fast=True) if dtype == "float32" else BFLOAT16[tag]
            assert a == pytest.approx(b, rel=limit, abs=1e-9), (tag, step)


def assert_same_weights(workspace, key, row):
    got, want, before = (tensors(workspace / path) for path in (key, kind(row), student(row)))
    assert got.keys() == want.keys() == before.keys()
    if row["dtype"] == "float32":
        assert update_difference(got, want, before) <= MARGIN * WEIGHTS_FLOOR
    for tensor, expected in want.items():
        assert (got[tensor] - expected).norm() <= 2 * HALF * expected.norm(), tensor
        assert (expected - before[tensor]).norm() > 2 * HALF * expected.norm(), f"{tensor} hardly trained"


def test_every_pair_of_choices_that_can_meet_is_trained():
    choices = [(factor, value) for factor, values in FACTORS.items() for value in values]
    for (first, a), (second, b) in itertools.combinations(choices, 2):
        fixed = {first: [a], second: [b]}
        rows = itertools.product(*(fixed.get(factor, values) for factor, values in FACTORS.items()))
        can_meet = first != second and any(possible(dict(zip(FACTORS, values, strict=True))) for values in rows)
        assert can_meet == any(row[first] == a and row[second] == b for row in ROWS), (first, a, second, b)
