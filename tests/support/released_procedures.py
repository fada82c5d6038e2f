"""Whole small trainings by a method's released procedure, written out in float64 through transformers' model.

Plain gradient descent; a step has every sample, so that no order matters.
"""

from __future__ import annotations

import json
import math

import numpy as np
import torch
import transformers
from finetune_runs import write_data, write_models
from layout_runs import tensors
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, RowPlan, SampleOrder, aligned_lengths, alignment, encode, encode_at

STEPS, RATE, ROW = 50, 0.0005, 64
# Of losses and mean masses: float32 roundings of 6e-8 in some dozens of operations a step, which 50 steps add up.
BOUND = 2e-5


def write_workspace(folder):
    """A model, and data that two ranks of packed rows share evenly, also with log p of the model at the start; the
    number of rows."""
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
    return count


def training_words(folder, rows, *, rate=RATE, steps=STEPS):
    """Flags of a training of packed rows by plain gradient descent, each step of which has every sample."""
    return [
        *("--hf-model", folder / "untied", "--seq-length", ROW, "--train-iters", steps, "--pack"),
        *("--global-batch-size", rows, "--optimizer", "sgd", "--sgd-momentum", 0, "--weight-decay", 0),
        *("--clip-grad", 0, "--lr", rate, "--min-lr", rate),
    ]


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


def descend(folder, of_sample, *, refresh=0, rate=RATE):
    """Loss and mean label mass of each step [STEPS, 2], and the model after them.

    of_sample: (log p, old log p) of a sample's tokens to their losses and label masses. refresh: old log p is that of
    the model at the last step that it divides; 0: at the start.
    """
    model, data, found = network(folder), records(folder), []
    for step in range(STEPS):
        if step == 0 or (refresh and step % refresh == 0):
            with torch.no_grad():
                old = [log_probabilities(model, record) for record in data]
        losses, masses = [], []
        for record, before in zip(data, old, strict=True):
            loss, mass = of_sample(log_probabilities(model, record), before)
            losses.append(loss)
            masses.append(mass.detach())
        loss = torch.cat(losses).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append((loss.item(), torch.cat(masses).mean().item()))
        with torch.no_grad():
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= rate * gradient
    return np.array(found), {name: parameter.detach() for name, parameter in model.named_parameters()}


def columns(results):
    """Loss and mean label mass of each step, of each training by its name."""
    scalars = {name: result["scalars"] for name, result in results.items()}
    return {name: np.array([values["lm loss"], values["label mass"]]).T for name, values in scalars.items()}


def assert_follows(folder, name, values, expected, weights):
    """A training's losses and masses, and its export, are those of the procedure."""
    assert values.shape == (STEPS, 2), name
    assert (np.abs(values - expected) <= BOUND * np.abs(expected)).all(), (name, np.abs(values - expected).max(0))
    saved, start = tensors(folder / f"hf-{name}"), tensors(folder / "untied")
    difference = math.sqrt(sum(float((saved[key] - value).square().sum()) for key, value in weights.items()))
    change = math.sqrt(sum(float((before - weights[key]).square().sum()) for key, before in start.items()))
    # Weights are float32: a step rounds each by half a unit in its last place, and steps add up like a random walk.
    # Where the whole change is less than a thousandth of the weights, that is most of what there is.
    size = math.sqrt(sum(float(value.square().sum()) for value in weights.values()))
    rounding = math.sqrt(STEPS) * 2**-24 * size
    assert difference <= 10 * BOUND * change + rounding, (name, difference / change)
