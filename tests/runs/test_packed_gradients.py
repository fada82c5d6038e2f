"""The gradient of a set of samples in packed rows is that of float64 autograd, of the samples one by one."""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from finetune_runs import run_tool, vocabulary, write_data, write_model, write_models
from launching import run_ranks
from layout_runs import SEQUENCE_PARALLEL, ep, launch, pp, tensors, tp
from loss_definitions import sft, target_sft
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, RowPlan, SampleOrder, aligned_lengths, alignment, encode, encode_at

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

ROW = 64
# Such that what a step takes from a weight outweighs the weight's own rounding.
RATE = 1000.0
# Relative to the whole gradient: some float32 roundings of 6e-8 in each of a dozen operations a layer.
BOUND = 1e-6
CP = ["--context-parallel-size", 2]
HYBRID = ["--model-class", "hybrid"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
LONGROPE = dict(rope_type="longrope", short_factor=[1, 1.5, 2], long_factor=[1, 3, 9])
FAMILIES = {
    # Rotates a part of each head, by a factor besides; tensors are fused.
    "partial": (
        "Phi3",
        dict(partial_rotary_factor=0.75, original_max_position_embeddings=64, rope_parameters=LONGROPE),
    ),
    # Pairs of neighbours; norms behind attention and MLP.
    "normed": ("Glm4", dict(head_dim=8)),
    "multiplied": (
        "Granite",
        dict(embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=1.3)
        | dict(tie_word_embeddings=True),
    ),
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    write_models(folder)
    for name, (family, extra) in FAMILIES.items():
        config = SIZES | dict(vocab_size=vocabulary(), pad_token_id=None, max_position_embeddings=256) | extra
        write_model(folder / name, family, config, torch.Generator().manual_seed(3))
    return folder


@pytest.fixture(scope="module")
def rows(workspace):
    """Of a file that is one step at every layout: a number that two ranks of two micro-batches each divide."""
    for samples in range(40, 80):
        write_data(workspace / "train.jsonl", samples, seed=1)
        file = JsonlFile(workspace / "train.jsonl")
        lengths = [min(len(encode_at(file, tokenizer(), ROW, i).input_ids), ROW) for i in range(samples)]
        aligned = aligned_lengths(np.array(lengths), alignment(ROW, 1))
        count = len(RowPlan(SampleOrder([samples], seed=7), aligned, ROW).epoch(0))
        if count % 4 == 0:
            assert count < samples / 2, "the rows hold several samples"
            return count
    raise AssertionError("no such number of samples")


@pytest.fixture(scope="module")
def cache(workspace, rows):
    """Of the teacher, every token kept."""
    words = ["--teacher-hf", workspace / "teacher", "--data", workspace / "train.jsonl", "--out", workspace / "cache"]
    words += ["--k", vocabulary(), "--dtype", "float32", "--seq-length", ROW]
    ((code, printed),) = run_ranks(1, run_tool, ("cache_teacher", words), timeout=200, megatron=True)
    assert code == 0, printed[-3000:]
    return workspace / "cache"


def tokenizer():
    return byte_tokenizer(CHATML, eos="<|im_end|>")


def float64_gradient(workspace, model, loss, teacher=None):
    """By name, of the mean of loss over the supervised tokens, through transformers' model."""

    def load(name):
        # The default for experts knows no float64.
        return transformers.AutoModelForCausalLM.from_pretrained(
            workspace / name, dtype=torch.float64, experts_implementation="eager"
        )

    network, total, count = load(model), torch.zeros(()), 0
    second = None if teacher is None else load(teacher)
    for line in (workspace / "train.jsonl").read_text().splitlines():
        sample = encode(tokenizer(), json.loads(line), ROW)
        ids, supervised = torch.tensor(sample.input_ids), torch.tensor(sample.supervised[1:])
        with torch.no_grad():
            known = None if second is None else second(ids[None, :-1]).logits[0][supervised]
        logits = network(ids[None, :-1]).logits[0][supervised]
        total, count = total + loss(logits, ids[1:][supervised], known, {}).sum(), count + int(supervised.sum())
    (total / count).backward()
    gradients = {}
    for name, parameter in network.named_parameters():
        gradients |= as_saved(name, parameter.grad)
    return gradients


def as_saved(name, gradient):
    """transformers holds the experts of a layer in one parameter, and saves them one by one."""
    layer, _, part = name.partition(".experts.")
    if not part:
        return {name: gradient}
    halves = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
    return {
        f"{layer}.experts.{number}.{half}.weight": own.chunk(len(halves))[place]
        for number, own in enumerate(gradient)
        for half, place in halves.items()
    }


def assert_gradient(folder, before, expected, name):
    """A step of plain SGD took the gradient from the weights."""
    after = tensors(folder)
    size = math.sqrt(sum(float(gradient.square().sum()) for gradient in expected.values()))
    error = 0.0
    for key in after:
        found = (before[key].double() - after[key].double()) / RATE
        error += float((found - expected[key]).square().sum() if key in expected else found.square().sum())
    assert expected.keys() <= after.keys() and math.sqrt(error) <= BOUND * size, (name, math.sqrt(error) / size)


def test_gradients_of_packed_rows_are_those_of_float64_one_by_one(workspace, rows, cache):
    """With no teacher, a live one and a cached one."""
    shared = ["--sft-train", workspace / "train.jsonl", "--seq-length", ROW, "--pack", "--train-iters", 1]
    shared += ["--global-batch-size", rows, "--optimizer", "sgd", "--sgd-momentum", 0, "--weight-decay", 0]
    shared += ["--clip-grad", 0, "--lr", RATE, "--min-lr", RATE]
    target = ["--objective", "target-sft", "--objective-args", "eta=0.4"]
    models = {"none": "untied", "live": "untied", "cached": "untied"}
    models |= {name: name for name in ("tied", "experts", *FAMILIES)}
    words = {kind: ["--hf-model", workspace / model, *shared] for kind, model in models.items()}
    words["live"] += [*target, "--teacher-hf", workspace / "teacher"]
    words["cached"] += [*target, "--teacher-cache", cache]
    taught = float64_gradient(workspace, "untied", target_sft(0.4), "teacher")
    expected = {kind: float64_gradient(workspace, kind, sft) for kind in ("tied", "experts", *FAMILIES)}
    expected |= {"none": float64_gradient(workspace, "untied", sft), "live": taught, "cached": taught}
    vpp = [*pp(2), *VPP2]
    layouts = {
        1: {kind: [] for kind in ("none", "tied", "experts", "cached", "partial", "multiplied")}
        | {f"{kind} recomputed": ["--recompute-activations"] for kind in ("live", "normed")},
        2: {
            **{"none at TP2 SP": [*tp(2), *SEQUENCE_PARALLEL], "none at PP2": pp(2), "none at CP2": CP},
            **{"none at VPP2": vpp, "none at DP2": [], "tied at TP2": tp(2), "tied at PP2": pp(2), "tied at CP2": CP},
            **{"live at TP2 SP": [*tp(2), *SEQUENCE_PARALLEL], "live at VPP2": vpp, "live at CP2": CP},
            **{"cached at CP2": CP, "cached at DP2": [], "experts at EP2": ep(2), "experts at CP2": CP},
            **{"partial at TP2": tp(2), "partial at CP2": CP, "normed at TP2": tp(2), "multiplied at PP2": pp(2)},
            **{
                "live at TP2 SP, hybrid": [*tp(2), *SEQUENCE_PARALLEL, *HYBRID],
                "none at VPP2, hybrid": [*vpp, *HYBRID],
            },
            **{"normed at CP2, hybrid": [*CP, *HYBRID], "experts at EP2, hybrid": [*ep(2), *HYBRID]},
        },
        4: {
            "live at TP2 SP VPP2": [*tp(2), *SEQUENCE_PARALLEL, *vpp],
            "cached at TP2 SP PP2": [*tp(2), *SEQUENCE_PARALLEL, *pp(2)],
            "experts at EP2 PP2, hybrid": [*ep(2), *pp(2), *HYBRID],
        },
    }
    for ranks, flags in layouts.items():
        exported = {name: workspace / f"{name} trained" for name in flags}
        runs = {name: [*words[name.split()[0]], *layout, "--save-hf", exported[name]] for name, layout in flags.items()}
        launch(ranks, runs, workspace, timeout=400)
        for name, folder in exported.items():
            kind = name.split()[0]
            assert_gradient(folder, tensors(workspace / models[kind]), expected[kind], name)
