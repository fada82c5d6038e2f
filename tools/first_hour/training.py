"""Steps that train or convert: tiny models with each implementation of the layers, waits of the host, families."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path

from tools.benchmarking import step
from tools.first_hour import sync_waits
from tools.first_hour.work import FLOAT32, Curves, Failed, NotRun, Work, needs

SHAPE = step.Shape(vocabulary=512, hidden=256, layers=2, seq_length=64, global_batch=8, steps=6)
_CURVES = "curves.json"
# Relative to the value of the same step on the CPU in float32. float32: sums in another order. bfloat16: roundings of
# 2^-9 in every product of a shallow model; on the CPU losses are off by 7e-5 and gradients' norms by 1e-3.
BOUNDS = {"float32": {"lm loss": 1e-4, "grad norm": 1e-3}, "bfloat16": {"lm loss": 2e-3, "grad norm": 1e-2}}
_UNFUSED = ["--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"]
_LOCAL = ["--transformer-impl", "local", "--no-persist-layer-norm", "--no-rope-fusion"]
# Apex's, by which Megatron adds a weight's gradient to main_grad in the product itself.
_FUSED_ACCUMULATION = "fused_weight_gradient_mlp_cuda"


def finetune_cpu(work: Work) -> list[str]:
    step.write(SHAPE, work.folder)
    curves = work.train(SHAPE, ["--objective", "sft"], environment={"CUDA_VISIBLE_DEVICES": ""})
    (work.folder / _CURVES).write_text(json.dumps(curves))
    return [_in_words(curves)]


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
        curves = work.train(SHAPE, ["--objective", "sft", *words, *flags], environment=FLOAT32)
        lines.append(f"- {dtype}: {_in_words(curves)}; {_beside_the_cpu(work, curves, dtype)}")
    return lines


def _beside_the_cpu(work: Work, curves: Curves, dtype: str) -> str:
    path = work.folder.parent / "finetune-cpu" / _CURVES
    if not path.exists():
        return "not compared, as finetune-cpu has not passed"
    return beside(curves, json.loads(path.read_text()), BOUNDS[dtype])


def beside(curves: Curves, expected: Curves, bounds: dict[str, float]) -> str:
    """How far the curves of two trainings are apart, relative; Failed where that is beyond a bound."""
    said = []
    for name, bound in bounds.items():
        pairs = list(zip(curves[name], expected[name], strict=True))
        off = max(abs(a - b) / abs(b) for a, b in pairs)
        if not off <= bound:
            raise Failed(f"{name} is off by {off:.1e}, {bound:.0e} allowed: {pairs}")
        said.append(f"{name} off by {off:.1e} of {bound:.0e} allowed")
    return ", ".join(said)


def _in_words(curves: Curves) -> str:
    return f"losses {', '.join(f'{loss:.6f}' for loss in curves['lm loss'])}"


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
    command = ["qtarget_megatron.commands.convert_hf"]
    text = "".join(work.ranks([*command, *words], 1, FLOAT32) for words in conversions())
    differing = different_tensors(work.folder / "model", work.folder / "exported")
    if differing:
        raise Failed(f"{len(differing)} tensors are not exported as they were imported: {', '.join(differing[:5])}")
    of_its_own, of_local_layers = re.findall(r"check: (over .*)", text)
    return [
        f"- {families.FAMILIES[family][0]}: every tensor is exported as it was imported",
        f"- its checkpoint: {of_its_own}",
        f"- a checkpoint of local layers: {of_local_layers}",
    ]


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


def with_and_without(
    work: Work, flags: list[str], *, plain: Sequence[str] = (), gpus: int = 1, engine: bool = False, tied: bool = False
) -> list[str]:
    """Trained with flags and without. plain: what both have; gpus, engine: what they need; tied: the model's output
    layer and its embedding are one."""
    work.needs_gpus(gpus)
    if engine:
        work.needs_engine()
    words = ["--objective", "sft", "--bf16", *plain]
    step.write(SHAPE, work.folder, tied=tied)
    without = work.train(SHAPE, words, gpus)
    curves = work.train(SHAPE, [*words, *flags], gpus)
    return [f"{_in_words(curves)}; beside a run without: {beside(curves, without, BOUNDS['bfloat16'])}"]


def fp8(work: Work) -> list[str]:
    work.needs_engine()
    if work.capability < (8, 9):
        raise NotRun(
            f"8-bit products need a GPU of sm_89 or newer, and this is sm_{''.join(map(str, work.capability))}"
        )
    step.write(SHAPE, work.folder)
    return [_in_words(work.train(SHAPE, ["--objective", "sft", "--bf16", "--fp8-format", "hybrid"]))]
