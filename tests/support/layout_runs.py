"""Trainings at parallel layouts: their flags, starting them, and comparing them with one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from finetune_runs import TRAIN_ITERS, run_all
from launching import run_ranks
from noise_floor import MARGIN, TAGS, WEIGHTS_FLOOR, bound, update_difference
from safetensors import safe_open

# Every registered objective, with parameters at which it trains on some tokens of the random student and not on others.
ARGUMENTS = {
    "sft": [],
    "dft": [],
    "beyond-log": ["alpha=0.5"],
    "profit": ["tau=0.002"],
    "eaft": ["k=150"],
    "weighted-sft": [],
    "iw-sft": ["temperature=3"],
    "infosft": ["p_bar=0.6"],
    "idft": ["beta=8"],
    "pear": ["ratio_low=-2", "ratio_high=1"],
    "tsallis": ["q=0.99"],
    "wit": ["prompt=0.3", "response=0.8"],
    "anchored": [],
    "cft": ["denominator=critical"],
    "label-smoothing": ["lam=0.2"],
    "sft-kl": ["lam=0.3"],
    "asft": [],
    "psft": ["refresh=0"],
    "gem": [],
    "kd": ["temperature=2"],
    "hybrid-kd": ["lam=0.4"],
    "target-sft": ["eta=0.4"],
    "deft": [],
    "focal": [],
    "talr": ["tau=2"],
    "poly1": [],
    "gift": ["beta=4"],
    "entropy-mask": ["threshold=5.38"],
    "reverse-kl": ["lam=0.7"],
    "mixed-kl": ["alpha=0.3"],
    "jsd": ["beta=0.3"],
    "skew-kl": [],
    "skew-reverse-kl": [],
    "total-variation": ["lam=0.8"],
}
SEQUENCE_PARALLEL = ["--sequence-parallel"]
DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]


def tp(size):
    return ["--tensor-model-parallel-size", size]


def pp(size):
    return ["--pipeline-model-parallel-size", size]


def launch(world_size, runs, workspace, timeout, run=run_all):
    """Results of the last rank, which writes the scalars; every run must have ended well on every rank.

    run: run_all, or a function like it that prepares each rank before.
    """
    runs = {name: [str(word) for word in words] for name, words in runs.items()}
    results = run_ranks(world_size, run, (runs, str(workspace)), timeout, megatron=True)
    for rank, outcome in enumerate(results):
        for name, result in outcome.items():
            assert result["code"] in (0, None), f"{name} on rank {rank}:\n{result['printed'][-3000:]}"
    return results[-1]


def assert_same_training(result, expected, first_step=0):
    for tag in (*TAGS, "supervised tokens"):
        got, want = result["scalars"][tag], expected["scalars"][tag][first_step:]
        assert len(got) == TRAIN_ITERS - first_step, tag
        for step, (a, b) in enumerate(zip(got, want, strict=True), first_step + 1):
            if math.isnan(b):  # the trust of an objective whose total mass is 0
                assert math.isnan(a), (tag, step)
            else:
                limit = 0 if tag == "supervised tokens" else bound(tag, step)
                assert a == pytest.approx(b, rel=limit, abs=1e-9), (tag, step)


def assert_layouts(results, single):
    for name, result in results.items():
        kind = name.split(" at ")[0]
        try:
            assert_same_training(result, single[kind])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def compare_exports(found: Path, expected: Path, source: Path) -> None:
    """Both exports hold the same trained weights, and those differ from the source's."""
    got, want, before = (tensors(folder) for folder in (found, expected, source))
    assert got.keys() == want.keys() == before.keys()
    for name, tensor in want.items():
        assert not torch.equal(tensor, before[name]), f"{name} was not trained"
    assert update_difference(got, want, before) <= MARGIN * WEIGHTS_FLOOR
    for file in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (found / file).read_bytes() == (source / file).read_bytes()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    result = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as shard:
            result |= {name: shard.get_tensor(name) for name in shard.keys()}
    return result


def ep(size, tensor=None):
    words = ["--expert-model-parallel-size", size]
    return words if tensor is None else [*words, "--expert-tensor-parallel-size", tensor]
