"""Weights that are no numbers are found where they are read, by name; a training that takes no step is no success."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from finetune_runs import COMMON, run_all, write_data, write_models
from launching import run_ranks
from safetensors.torch import load_file, save_file

from qtarget_megatron.huggingface import HFReader, is_finite
from qtarget_megatron.megatron.faults.explained import NotFinite
from qtarget_megatron.megatron.faults.soundness import Soundness, most_skips

NAMES = ("model.layers.2.mlp.down_proj.weight", "model.norm.weight")
WHOLE, PART = ["--train-iters", 2], ["--tensor-model-parallel-size", 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_number_among_many(dtype, value):
    tensor = torch.linspace(-9, 9, 5000).to(dtype).view(50, 100)
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(tensor.new_tensor(torch.finfo(dtype).max))
    for place in (0, 2500, 4999):
        broken = tensor.clone()
        broken.view(-1)[place] = value
        assert not is_finite(broken) and is_finite(broken) == broken.isfinite().all().item()
    assert is_finite(torch.arange(5)) and is_finite(torch.tensor([True]))


def test_only_the_slices_that_hold_it_are_refused(tmp_path):
    """Each rank looks at what it reads: nothing is read besides."""
    weight = torch.ones(6, 8)
    weight[4, 5] = math.nan
    save_file({"model.w": weight}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    with HFReader(tmp_path) as reader:
        assert reader.read("model.w", rows=(0, 4)).shape == (4, 8)
        assert reader.read("model.w", cols=(0, 5)).shape == (6, 5)
        assert reader.bytes_read == 4 * (32 + 30)
        for part in ({}, {"rows": (4, 5)}, {"cols": (5, 6)}):
            with pytest.raises(ValueError, match=r"model.safetensors: expected finite weights, got .* in model.w: "):
                reader.read("model.w", **part)


# ---- counting, with an optimizer that says what Megatron's says


def training(skipped, *, limit=3, **changes):
    """How a training ends whose steps were skipped or not: the step in which it is ended, or "end"; and why."""
    args = SimpleNamespace(qtarget_max_skips=limit, fp16=False, loss_scale=1.0, curr_iteration=0, **changes)
    part = SimpleNamespace(found_inf=torch.zeros(1))
    optimizer = SimpleNamespace(chained_optimizers=[SimpleNamespace(found_inf=torch.zeros(1)), part])
    scale_loss = type("Optimizer", (), {"scale_loss": lambda self: None})
    bound = scale_loss()
    bound.chained_optimizers = optimizer.chained_optimizers
    model = SimpleNamespace(config=SimpleNamespace(grad_scale_func=bound.scale_loss), training=True)
    soundness = Soundness(args, [model], from_checkpoint=False)
    step = soundness.watched(lambda data, model: None)
    try:
        for number, found in enumerate(skipped):
            args.curr_iteration = number
            step(None, model), step(None, model)  # micro-batches
            part.found_inf.fill_(float(found))
        number = "end"
        soundness.finish()
    except NotFinite as error:
        return number, str(error)
    return "end", None


def count(cases):
    return {name: training(*words, **more) for name, (words, more) in cases.items()}


@pytest.mark.distributed
def test_steps_in_a_row_are_counted():
    cases = {
        "taken": (([0] * 9,), {}),
        "two and two": (([1, 1, 0, 1, 1, 0],), {}),
        "three": (([0, 1, 1, 1, 0],), {}),
        "at the end": (([0, 1, 1, 1],), {}),
        "none": (([1, 1],), {}),
        "no step": (([],), {}),
    }
    (found,) = run_ranks(1, count, (cases,), megatron=True)
    assert found["taken"] == found["two and two"] == found["no step"] == ("end", None)
    assert found["three"][0] == 4 and "3 steps in a row were skipped" in found["three"][1]
    assert found["at the end"][0] == "end" and "3 steps in a row" in found["at the end"][1]
    assert found["none"] == ("end", "every step was skipped, so the model is as it was, and is not exported")


def test_half_precision_may_look_for_its_loss_scale():
    """From 2^32 down to 1, one halving a step; the first waits for --hysteresis steps."""
    args = dict(qtarget_max_skips=20, loss_scale=None, initial_loss_scale=2.0**32, min_loss_scale=1.0, hysteresis=2)
    assert most_skips(SimpleNamespace(fp16=True, **args)) == 20 + 32 + 2
    assert most_skips(SimpleNamespace(fp16=True, **args | {"loss_scale": 128.0})) == 20
    assert most_skips(SimpleNamespace(fp16=False, **args)) == 20


# ---- in a training


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("soundness")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    records = [json.loads(line) | {"weight": 1e38} for line in (folder / "train.jsonl").read_text().splitlines()]
    (folder / "huge.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for source, name, value in (("untied", NAMES[0], math.nan), ("teacher", NAMES[1], math.inf)):
        shutil.copytree(folder / source, folder / f"{source}-broken")
        path = folder / f"{source}-broken" / "model.safetensors"
        weights = load_file(path)
        weights[name].view(-1)[-1] = value
        save_file(weights, path, metadata={"format": "pt"})
    return folder


def command(folder, *words, model="untied", data="train.jsonl"):
    return [*COMMON, "--hf-model", folder / model, "--sft-train", folder / data, *words]


def damage(folder):
    """Put a NaN into the final norm of a checkpoint, whose numbers the export of it says."""
    norm = load_file(folder / "out" / "model.safetensors")["model.norm.weight"].numpy().tobytes()
    found = 0
    for path in (folder / "saved" / "iter_0000004").glob("*.distcp"):
        content = path.read_bytes()
        found += content.count(norm)
        path.write_bytes(content.replace(norm, np.float32(np.nan).tobytes() + norm[4:]))
    assert found == 1


def run_and_damage(folder, first, then):
    """The checkpoint is one of those that have no fingerprint, by which the damage would be seen first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qtarget_megatron.megatron.weights.fingerprint.Fingerprints.record", lambda *arguments: None)
        saved = run_all({"first": first}, str(folder), [])
    return saved, damage(folder), run_all(then, str(folder), [])


@pytest.mark.distributed
@pytest.mark.slow
def test_weights_that_are_not_finite_are_named_before_training(workspace):
    saved = ["--save", workspace / "saved", "--load", workspace / "saved", "--save-hf", workspace / "out"]
    saved += ["--save-hf-dtype", "float32"]
    later = ["--load", workspace / "saved", "--save-hf", workspace / "out-2"]
    cases = {
        "student": command(workspace, "--save-hf", workspace / "out-3", model="untied-broken"),
        "teacher": command(workspace, "--objective", "kd", "--teacher-hf", workspace / "teacher-broken"),
        "resumed": command(workspace, *later, "--train-iters", 6, "--override-opt_param-scheduler"),
        "exported": command(workspace, *later, "--skip-train"),
        "resumed with its weights alone": command(workspace, *later, "--train-iters", 6, "--no-load-optim"),
        "fine-tuned": command(workspace, *later, "--finetune"),
        "teacher's checkpoint": command(
            workspace, "--objective", "kd", "--teacher-hf", workspace / "untied", "--teacher-load", workspace / "saved"
        ),
    }
    ((first, _, found),) = run_ranks(
        1, run_and_damage, (workspace, command(workspace, *saved), cases), timeout=300, megatron=True
    )
    assert first["first"]["code"] == 0, first["first"]["printed"][-3000:]
    bad = "got NaN or infinity in"
    for name, pieces in {
        "student": [str(workspace / "untied-broken" / "model.safetensors"), NAMES[0], bad],
        "teacher": [str(workspace / "teacher-broken" / "model.safetensors"), NAMES[1], bad],
        "resumed": ["--load", "decoder.final_layernorm.weight", "--ckpt-step", bad],
        "exported": ["--load", "decoder.final_layernorm.weight", "--ckpt-step", bad],
        "resumed with its weights alone": ["--load", "decoder.final_layernorm.weight", "--ckpt-step", bad],
        "fine-tuned": ["--load", "decoder.final_layernorm.weight", "--ckpt-step", bad],
        "teacher's checkpoint": ["--teacher-load", "decoder.final_layernorm.weight", bad],
    }.items():
        assert found[name]["code"] == 2, (name, found[name]["printed"][-3000:])
        (line,) = [line for line in found[name]["printed"].splitlines() if line.startswith("finetune: error")]
        assert all(piece in line for piece in pieces), line
    assert not list(workspace.glob("out-*"))


@pytest.mark.distributed
@pytest.mark.slow
def test_a_training_that_skips_all_steps_is_no_success(workspace):
    """Losses of 1e38 times some nats, on two ranks: all of them end, and nothing is exported."""
    words = ["--objective", "weighted-sft", "--qtarget-on-nan", "skip", "--save-hf", workspace / "skipped"]
    cases = {
        "in a row": command(
            workspace, *words, *PART, "--bf16", "--train-iters", 30, "--qtarget-max-skips", 3, data="huge.jsonl"
        ),
        "all": command(workspace, *words, *WHOLE, "--use-distributed-optimizer", data="huge.jsonl"),
    }
    results = run_ranks(2, run_all, (cases, str(workspace), []), timeout=300, megatron=True)
    for name, step, words in (("in a row", 4, "3 steps in a row were skipped"), ("all", 2, "every step was skipped")):
        assert [result[name]["code"] for result in results] == [1, 1], results[0][name]["printed"][-3000:]
        (line,) = [x for x in results[0][name]["printed"].splitlines() if x.startswith("finetune: error on rank 0")]
        assert words in line and f"step {step}: " in line, line
    assert not list(workspace.glob("skipped*")) and not list(workspace.glob(".skipped*"))
