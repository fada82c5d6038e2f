"""Steps that train or convert: tiny models with each implementation of the layers, waits of the host, families."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from tools.benchmarking import step
from tools.first_hour import sync_waits
from tools.first_hour.work import FLOAT32, Failed, NotRun, Work, needs

SHAPE = step.Shape(vocabulary=512, hidden=256, layers=2, seq_length=64, global_batch=8, steps=6)
_LOSSES = "losses.json"
# Relative to the loss of the same step on the CPU. float32: sums in another order, and a few steps of Adam on them.
# bfloat16: rounding of 2^-8 in each product of a shallow model.
BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
_UNFUSED = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
_LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
# Apex's, by which Megatron adds a weight's gradient to main_grad in the product itself.
_FUSED_ACCUMULATION = "fused_weight_gradient_mlp_cuda"


def finetune_cpu(work: Work) -> list[str]:
    step.write(SHAPE, work.folder)
    losses = work.train(SHAPE, ["--objective", "sft"], environment={"CUDA_VISIBLE_DEVICES": ""})
    (work.folder / _LOSSES).write_text(json.dumps(losses))
    return [_in_words(losses)]


def finetune(work: Work, layers: str) -> list[str]:
    """layers: "engine" with nothing of Apex's, "apex" with its fused accumulation, or "local"."""
    words = {"engine": _UNFUSED, "apex": [], "local": _LOCAL}[layers]
    if layers == "engine":
        work.needs_engine()
    elif layers == "apex":
        needs(_FUSED_ACCUMULATION, f"Apex's {_FUSED_ACCUMULATION}", "build Apex with its C++ and CUDA extensions")
    step.write(SHAPE, work.folder)
    lines = []
    for dtype, flags in {"float32": [], "bfloat16": ["--bf16"]}.items():
        losses = work.train(SHAPE, ["--objective", "sft", *words, *flags], environment=FLOAT32)
        lines.append(f"- {dtype}: {_in_words(losses)}; {beside(losses, _of_the_cpu(work), BOUNDS[dtype])}")
    return lines


def _of_the_cpu(work: Work) -> list[float] | None:
    path = work.folder.parent / "finetune-cpu" / _LOSSES
    return json.loads(path.read_text()) if path.exists() else None


def beside(losses: Sequence[float], expected: Sequence[float] | None, bound: float) -> str:
    """How far losses are from those of the CPU, relative; Failed where that is beyond the bound."""
    if expected is None:
        return "not compared, as finetune-cpu has not passed"
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True))
    if not off <= bound:
        raise Failed(f"losses differ from the CPU's by {off:.1e}, {bound:.0e} allowed: {losses} against {expected}")
    return f"off the CPU's by {off:.1e} at most, {bound:.0e} allowed"


def _in_words(losses: Sequence[float]) -> str:
    return f"losses {', '.join(f'{loss:.6f}' for loss in losses)}"


def waits(work: Work, variant: str) -> list[str]:
    """variant: of tools/benchmarking/step.py's."""
    step.write(SHAPE, work.folder)
    if "cache" in step.VARIANTS[variant]:
        work.ranks(step.caching(SHAPE), 1)
    _, *words = step.training(SHAPE, [*step.VARIANTS[variant], "--bf16"])
    found = sync_waits.waits(work.ranks(["tools.first_hour.sync_waits", *words], 1))
    if found is None:
        raise Failed("the log shows fewer than two steps")
    micro_batches = SHAPE.global_batch
    lines = [f"The last step ({micro_batches} micro-batches) waits {found.total()} times on the host:", ""]
    return lines + [f"- {count} x `{place}`" for place, count in found.most_common()]


def convert(work: Work, family: str) -> list[str]:
    """Load, export and check with Transformer Engine's layers, and what local layers have saved loaded by them."""
    work.needs_engine()
    from tools.first_hour import families

    write_family(work.folder, family)
    for words in conversions():
        text = work.ranks(["qtarget_megatron.commands.convert_hf", *words], 1, FLOAT32)
    differing = different_tensors(work.folder / "model", work.folder / "exported")
    if differing:
        raise Failed(f"{len(differing)} tensors are not exported as they were imported: {', '.join(differing[:5])}")
    verdicts = [line.partition("convert_hf: ")[2] for line in text.splitlines() if "convert_hf: over" in line]
    prefix = families.FAMILIES[family][0]
    return [f"{prefix}: every tensor exported as imported. Of a checkpoint of local layers, {' '.join(verdicts)}"]


def write_family(folder: Path, family: str) -> None:
    """model: a random one with a tokenizer; text: something to check it on."""
    from tools.first_hour import families

    families.write_model(folder / "model", family, tied=False, **families.engine_sizes(family))
    words = step.write_tokenizer(folder / "model", families.VOCAB)
    (folder / "text").write_text(" ".join(random.Random(6).choices(words, k=40)))


def conversions() -> list[list[str]]:
    """Words of convert_hf, in the order in which they are run in the step's folder."""
    model, check = ["--hf-model", "model"], ["--text", "text"]
    return [
        ["import", *model, "--save", "checkpoint"],
        ["export", *model, "--load", "checkpoint", "--save-hf", "exported"],
        ["check", *model, *check, "--load", "checkpoint"],
        ["import", *model, "--save", "local", *_LOCAL],
        ["check", *model, *check, "--load", "local"],
    ]


def different_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that two directories do not hold alike."""
    from safetensors.torch import load_file

    tensors = [
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()} for folder in (one, other)
    ]
    names = sorted(tensors[0].keys() | tensors[1].keys())
    return [name for name in names if not _same(tensors[0].get(name), tensors[1].get(name))]


def _same(one, other) -> bool:
    return one is not None and other is not None and one.dtype == other.dtype and one.equal(other)


def context_parallel(work: Work) -> list[str]:
    work.needs_engine()
    work.needs_gpus(2)
    words = [*step.VARIANTS["target-sft, live teacher"], "--context-parallel-size", "2", "--bf16"]
    step.write(SHAPE, work.folder)
    return [_in_words(work.train(SHAPE, words, 2))]


def overlap(work: Work) -> list[str]:
    work.needs_gpus(2)
    words = ["--objective", "sft", "--bf16", "--use-distributed-optimizer"]
    step.write(SHAPE, work.folder)
    plain = work.train(SHAPE, words, 2)
    losses = work.train(SHAPE, [*words, "--overlap-grad-reduce", "--overlap-param-gather"], 2)
    off = max(abs(a - b) / abs(b) for a, b in zip(losses, plain, strict=True))
    if not off <= BOUNDS["bfloat16"]:
        raise Failed(f"losses are off by {off:.1e} with the overlap: {losses} against {plain}")
    return [f"{_in_words(losses)}; without the overlap they differ by {off:.1e} at most"]


def fp8(work: Work) -> list[str]:
    work.needs_engine()
    if work.capability < (8, 9):
        raise NotRun(
            f"8-bit products need a GPU of sm_89 or newer, and this is sm_{''.join(map(str, work.capability))}"
        )
    step.write(SHAPE, work.folder)
    return [_in_words(work.train(SHAPE, ["--objective", "sft", "--bf16", "--fp8-format", "hybrid"]))]
