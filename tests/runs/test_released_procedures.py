"""Methods whose inputs must live during training, against their released procedure over a whole small training.

The procedure is written out here in float64 through transformers' model, with plain gradient descent; a step has every
sample, so that no order matters.
"""

import json
import math

import numpy as np
import pytest
import torch
import transformers
from finetune_runs import write_data, write_models
from layout_runs import SEQUENCE_PARALLEL, launch, pp, tensors, tp
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, RowPlan, SampleOrder, aligned_lengths, alignment, encode, encode_at

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS, RATE, ROW = 50, 0.0005, 64
# Of losses and mean weights: float32 roundings of 6e-8 in some dozens of operations a step, which 50 steps add up.
BOUND = 2e-5
CP = ["--context-parallel-size", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A model, and data that two ranks of packed rows share evenly, also with log p of the model at the start."""
    folder = tmp_path_factory.mktemp("procedures")
    write_models(folder)
    for samples in range(12, 40):
        write_data(folder / "train.jsonl", samples, seed=1)
        file = JsonlFile(folder / "train.jsonl")
        lengths = [min(len(encode_at(file, tokenizer(), ROW, i).input_ids), ROW) for i in range(samples)]
        count = len(
            RowPlan(SampleOrder([samples], seed=7), aligned_lengths(np.array(lengths), alignment(ROW, 1)), ROW).epoch(0)
        )
        if count % 4 == 0:
            break
    assert count % 4 == 0 and count < samples / 2
    model = network(folder)
    with (folder / "scored.jsonl").open("w") as scored:
        for record in records(folder):
            log_p = log_probabilities(model, record).tolist()
            scored.write(json.dumps(record | {"old_log_prob": log_p}) + "\n")
    return folder, count


def tokenizer():
    return byte_tokenizer(CHATML, eos="<|im_end|>")


def network(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "untied", dtype=torch.float64)


def records(folder):
    return [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]


def log_probabilities(model, record):
    """log p of each supervised token of a record."""
    sample = encode(tokenizer(), record, ROW)
    ids, supervised = torch.tensor(sample.input_ids), torch.tensor(sample.supervised[1:])
    log_p = torch.log_softmax(model(ids[None, :-1]).logits[0][supervised], -1)
    return log_p.gather(1, ids[1:][supervised][:, None])[:, 0]


def descend(folder, weigh):
    """Loss and mean weight of each step, and the model after them. weigh: (log p, log p at the start) of a sample's
    tokens, detached, to its weight."""
    model, data, found = network(folder), records(folder), []
    with torch.no_grad():
        start = [log_probabilities(model, record) for record in data]
    for _ in range(STEPS):
        total, weights, tokens = 0.0, 0.0, 0
        for record, before in zip(data, start, strict=True):
            log_p = log_probabilities(model, record)
            weight = weigh(log_p.detach(), before)
            total, weights, tokens = total - weight * log_p.sum(), weights + weight * len(log_p), tokens + len(log_p)
        loss = total / tokens
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.item(), float(weights) / tokens))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= RATE * gradient
    return np.array(found), {name: parameter.detach() for name, parameter in model.named_parameters()}


def iw_sft_weight(log_p, before):
    """As released: the exponential of the mean log ratio over a sample, clamped to 16."""
    return (log_p - before).mean().exp().clamp(0.0, 16.0)


@pytest.fixture(scope="module")
def trainings(workspace):
    """Losses and mean label masses of each step, and the exports, of iw-sft at several layouts."""
    folder, rows = workspace
    common = [
        *("--hf-model", folder / "untied", "--seq-length", ROW, "--train-iters", STEPS, "--pack"),
        *("--global-batch-size", rows, "--optimizer", "sgd", "--sgd-momentum", 0, "--weight-decay", 0),
        *("--clip-grad", 0, "--lr", RATE, "--min-lr", RATE),
    ]

    def words(name, *more, data="train"):
        export = ["--save-hf", folder / f"hf-{name}"]
        return [*common, "--sft-train", folder / f"{data}.jsonl", "--objective", "iw-sft", *more, *export]

    live = ["--teacher-hf", folder / "untied"]
    scored = ["--objective-args", "start=data"]
    found = launch(
        1,
        {
            "live": words("live", *live, "--no-pack", "--global-batch-size", len(records(folder))),
            "data": words("data", *scored, data="scored"),
        },
        folder,
        300,
    )
    found |= launch(
        2,
        {
            "live CP2": words("live CP2", *live, *CP),
            "live TP2 SP": words("live TP2 SP", *live, *tp(2), *SEQUENCE_PARALLEL, "--micro-batch-size", 2),
            "live PP2": words("live PP2", *live, *pp(2)),
            "data DP2": words("data DP2", *scored, data="scored"),
        },
        folder,
        400,
    )
    scalars = {name: result["scalars"] for name, result in found.items()}
    return folder, {name: np.array([values["lm loss"], values["label mass"]]).T for name, values in scalars.items()}


def test_iw_sft_is_the_released_procedure(trainings):
    folder, found = trainings
    expected, weights = descend(folder, iw_sft_weight)
    assert expected[0, 1] == 1 and expected[-1, 1] > 1.5, "the weights change"
    for name, values in found.items():
        assert values.shape == (STEPS, 2), name
        assert np.abs(values / expected - 1).max() <= BOUND, (name, np.abs(values / expected - 1).max(0))
        saved = tensors(folder / f"hf-{name}")
        difference = math.sqrt(sum(float((saved[key] - value).square().sum()) for key, value in weights.items()))
        change = math.sqrt(
            sum(float((before - weights[key]).square().sum()) for key, before in tensors(folder / "untied").items())
        )
        assert difference <= 10 * BOUND * change, (name, difference / change)


def test_weights_scored_once_are_another_method(trainings):
    """Of the model against itself they are all 1; any others are as fixed."""
    folder, found = trainings
    once, _ = descend(folder, lambda log_p, before: torch.ones((), dtype=torch.float64))
    assert np.abs(found["live"] / once - 1).max() > 1000 * BOUND
