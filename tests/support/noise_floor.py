"""How far a training is from itself when only its arithmetic is reordered: bounds between layouts stand on it.

Two layouts do the same sums in another order, and so do two processors. Float32 has no more to say about a layout than
what one process says about itself: with the samples of a batch in another order or in other micro-batches, and with
torch's and MKL's code for other processors. FLOOR is the largest relative difference among all of these, of each tag
and in each of KINDS, in the first step and in later ones. A bound is MARGIN times as much: layouts and processors that
were not measured are further draws of the same roundings, of which FLOOR is the largest of some hundreds.

Why later steps differ more, and why the runs have --adam-eps 1e-5: Adam divides an entry of the gradient by its own
size. With the default of 1e-8, an entry that is nearly zero, whose sign is rounding, moves its weight by a whole
learning rate, this way or that. The trust of a step 2 was 2e-6 off then (ATEN_CPU_CAPABILITY=default, a mixture of
experts), that of a step 1 2e-7. With an epsilon above the rounding of the gradients, training is a smooth function of
them again, and what is left of the growth is in FLOOR.

To measure again (some minutes; prints FLOOR and what sets it): python tests/support/noise_floor.py
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MEANS = ("lm loss", "trust", "p(y)", "entropy", "label mass", "residual mass", "total mass")
TAGS = (*MEANS, "grad-norm")
# Relative: of the first step, of later ones, of later ones where the learning rate is FAST. The means share theirs.
FLOOR = {"mean": (2.6e-7, 6.4e-7, 1.5e-6), "grad-norm": (6.3e-7, 4.0e-6, 4.0e-6)}
FAST = 5e-3
# Of an exported tensor after the last step: the norm of the difference, relative to that of what training changed.
WEIGHTS_FLOOR = 5.2e-5
MARGIN = 4

# Samples in a micro-batch, and a seed of the order of a batch's samples. The others are compared to the first one.
ORDERS = {"as they come": (1, None), "shuffled": (1, 1), "pairs": (2, 2), "fours": (4, 3), "at once": (8, None)}
# Code for other processors, on this one.
PROCESSORS = {
    "this one": {},
    "torch without vectors": {"ATEN_CPU_CAPABILITY": "default"},
    "torch with AVX2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "MKL for all": {"MKL_CBWR": "COMPATIBLE"},
    "MKL with AVX2": {"MKL_CBWR": "AVX2"},
    "MKL with AVX-512": {"MKL_CBWR": "AVX512"},
    "own kernels without vectors": {"QTARGET_CPU_ISA": "scalar"},
}


def floor(tag: str, step: int, *, fast: bool = False) -> float:
    """Of a step, counted from 1."""
    return FLOOR["mean" if tag in MEANS else tag][0 if step == 1 else 1 + fast]


def bound(tag: str, step: int, *, fast: bool = False) -> float:
    """The largest relative difference of a layout."""
    return MARGIN * floor(tag, step, fast=fast)


def kinds(folder: Path) -> dict[str, list]:
    """What is trained: each student of finetune_runs, and objectives whose masks or ratios are sharp."""
    from layout_runs import ARGUMENTS

    def words(student, objective, *more):
        flags = ["--hf-model", folder / student, "--sft-train", folder / "train.jsonl", "--objective", objective]
        flags += ["--objective-args", *ARGUMENTS[objective]] if ARGUMENTS[objective] else []
        return [*flags, *more]

    teacher = ["--teacher-hf", folder / "teacher"]
    found = {
        f"{name} target-sft": words(name, "target-sft", *teacher) for name in ("untied", "tied", "experts", "latent")
    }
    found |= {f"untied {name}": words("untied", name) for name in ("sft", "psft", "cft", "entropy-mask", "gem")}
    found |= {f"untied {name}": words("untied", name, *teacher) for name in ("kd", "asft")}
    fast = ["--lr", FAST, "--min-lr", FAST, "--train-iters", 5]
    found |= {f"{name} sft, fast": words(name, "sft", *fast) for name in ("untied", "experts")}
    return found


def run_reordered(runs: dict[str, tuple], folder: str) -> dict[str, dict]:
    """finetune_runs.run_all of (words, seed of the order within a batch, or None)."""
    from finetune_runs import run_all

    from qtarget_megatron.data import RowDataset

    read, found = RowDataset.__getitem__, {}
    try:
        for name, (words, seed) in runs.items():
            order = list(range(8)) if seed is None else random.Random(seed).sample(range(8), 8)
            RowDataset.__getitem__ = lambda data, item, order=order: read(data, 8 * (item // 8) + order[item % 8])
            found |= run_all({name: words}, folder)
    finally:
        RowDataset.__getitem__ = read
    return found


def differences(found: dict[str, list[float]], expected: dict[str, list[float]]) -> Iterator[tuple[str, int, float]]:
    """Tag, step and relative difference of each value that is a number other than 0."""
    for tag in TAGS:
        for step, (a, b) in enumerate(zip(found[tag], expected[tag], strict=True), 1):
            if not math.isnan(b) and abs(b) > 1e-6:
                yield tag, step, abs(a - b) / abs(b)


def update_difference(found: dict, expected: dict, before: dict) -> float:
    """The largest one among trained tensors: the norm of the difference, relative to that of the update."""
    return max(
        ((found[name] - tensor).norm() / (tensor - before[name]).norm()).item()
        for name, tensor in expected.items()
        if tensor.ne(before[name]).any()
    )


def measure(folder: Path) -> dict[str, dict[str, list[float]]]:
    """The scalars of each kind in each order, on this processor; exports are left in folder."""
    from finetune_runs import write_data, write_models
    from launching import run_ranks

    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    runs = {}
    for kind, words in kinds(folder).items():
        for order, (size, seed) in ORDERS.items():
            name = f"{kind}/{order}"
            flags = [*words, "--micro-batch-size", size, "--save-hf", folder / "exports" / name]
            runs[name] = ([str(word) for word in flags], seed)
    (folder / "exports").mkdir()
    for kind in kinds(folder):
        (folder / "exports" / kind).mkdir()
    (results,) = run_ranks(1, run_reordered, (runs, str(folder / "exports")), timeout=900, megatron=True)
    for name, result in results.items():
        assert result["code"] in (0, None), f"{name}:\n{result['printed'][-3000:]}"
    return {name: result["scalars"] for name, result in results.items()}


def main() -> None:
    from layout_runs import tensors

    with tempfile.TemporaryDirectory() as base:
        measured = {}
        for processor, environment in PROCESSORS.items():
            folder = Path(base, processor)
            folder.mkdir()
            subprocess.run(
                [sys.executable, __file__, str(folder)],
                check=True,
                env=os.environ | environment,
                stderr=subprocess.DEVNULL,
            )
            measured[processor] = json.loads((folder / "scalars.json").read_text())
        first = next(iter(PROCESSORS))
        largest, weights = {}, (0.0,)
        for processor, results in measured.items():
            for name, scalars in results.items():
                kind = name.split("/")[0]
                reference = f"{kind}/{next(iter(ORDERS))}"
                for tag, step, difference in differences(scalars, measured[first][reference]):
                    key = "mean" if tag in MEANS else tag, 0 if step == 1 else 1 + kind.endswith("fast")
                    largest[key] = max(largest.get(key, (0.0,)), (difference, tag, step, name, processor))
                student = kind.split()[0]
                paths = (processor, "exports", name), (first, "exports", reference), (first, student)
                difference = update_difference(*(tensors(Path(base, *path)) for path in paths))
                weights = max(weights, (difference, name, processor))
        for key, found in [*sorted(largest.items()), ("weights", weights)]:
            print(key, f"{found[0]:.1e}", *found[1:], sep=", ")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        out = Path(sys.argv[1])
        Path(out / "scalars.json").write_text(json.dumps(measure(out)))
