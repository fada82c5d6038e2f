"""Adapters: as peft trains them, at any layout; saved, merged, continued; the model as its own teacher."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from finetune_runs import (
    SEQ_LENGTH,
    TRAIN_ITERS,
    run_all,
    run_tool,
    vocabulary,
    write_data,
    write_model,
    write_models,
)
from launching import run_ranks
from layout_runs import DISTRIBUTED_OPTIMIZER, SEQUENCE_PARALLEL, ep, pp, tensors, tp
from lora_runs import DENSE, TARGETS, by_chain_rule, by_peft, factors, record_all, trained_words, write_adapters
from noise_floor import TAGS, bound
from safetensors.torch import save_file

from qtarget_megatron.huggingface import Lora
from tools.first_hour import families

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

RECOMPUTE = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
VIRTUAL = [*pp(2), "--num-layers-per-virtual-pipeline-stage", 1]
GPT, HYBRID = ["--model-class", "gpt"], ["--model-class", "hybrid"]
PACKED = ["--pack", "--seq-length", 64]
SELF = ["--objective", "target-sft", "--objective-args", "eta=0.4", "--teacher-self"]
# Families whose tensors, norms or multipliers differ -> targets.
FAMILIES = {"mixtral": ("k", "o", "experts"), "granite": DENSE, "glm4": DENSE, "smollm3": ("q", "k", "up", "down")}
# World size -> name: (model, flags of the layout and others). Those of one process have the same name before " at ".
LAYOUTS = {
    1: {
        **{model: (model, []) for model in TARGETS},
        "untied packed": ("untied", PACKED),
        "untied self": ("untied", SELF),
        "experts self": ("experts", SELF),
        "untied rslora": ("untied", ["--lora-rslora", "--lora-rank", 4]),
        "untied at recompute": ("untied", [*RECOMPUTE, *GPT]),
        "experts at recompute": ("experts", RECOMPUTE),
    },
    2: {
        "untied at TP2": ("untied", [*tp(2), *GPT]),
        "untied at TP2 SP recompute": ("untied", [*tp(2), *SEQUENCE_PARALLEL, *RECOMPUTE]),
        "tied at TP2 SP DO": ("tied", [*tp(2), *SEQUENCE_PARALLEL, *DISTRIBUTED_OPTIMIZER]),
        "tied at PP2": ("tied", pp(2)),
        "tied at CP2": ("tied", ["--context-parallel-size", 2]),
        "untied packed at DP2 DO": ("untied", [*PACKED, *DISTRIBUTED_OPTIMIZER]),
        "untied at VPP": ("untied", [*VIRTUAL, *HYBRID, "--micro-batch-size", 2]),
        "experts at EP2": ("experts", [*ep(2), *DISTRIBUTED_OPTIMIZER]),
        "experts at ETP2": ("experts", ep(1, 2)),
        "experts at TP2 EP2": ("experts", [*tp(2), *SEQUENCE_PARALLEL, *ep(2, 1)]),
        "experts self at TP2": ("experts", [*SELF, *tp(2), *SEQUENCE_PARALLEL]),
        "weighted at TP2 EP2": ("weighted", [*tp(2), *SEQUENCE_PARALLEL, *ep(2, 1)]),
        "latent at EP2": ("latent", ep(2)),
        "latent at PP2": ("latent", pp(2)),
        "sinks at TP2": ("sinks", [*tp(2), *SEQUENCE_PARALLEL, *ep(2, 1)]),
    },
    4: {
        # Two ranks share each key/value head.
        "tied at TP4": ("tied", tp(4)),
        "experts at TP2 EP2 ETP2": ("experts", [*tp(2), *SEQUENCE_PARALLEL, *ep(2, 2)]),
        "experts at TP2 PP2 EP2 DO": (
            "experts",
            [*tp(2), *SEQUENCE_PARALLEL, *pp(2), *ep(2, 1), *DISTRIBUTED_OPTIMIZER],
        ),
        "untied self at TP2 VPP": ("untied", [*SELF, *tp(2), *SEQUENCE_PARALLEL, *VIRTUAL, "--micro-batch-size", 2]),
        "untied packed at PP2 CP2": ("untied", [*PACKED, *pp(2), "--context-parallel-size", 2]),
    },
}


def launch(world_size, runs, workspace, timeout=400):
    """Results of the last rank, which writes the scalars, with what the first one printed, which logs."""
    runs = {name: [str(word) for word in run] for name, run in runs.items()}
    results = run_ranks(world_size, run_all, (runs, str(workspace)), timeout, megatron=True)
    for rank, outcome in enumerate(results):
        for name, result in outcome.items():
            assert result["code"] in (0, None), f"{name} on rank {rank}:\n{result['printed'][-3000:]}"
    return {name: result | {"printed": results[0][name]["printed"]} for name, result in results[-1].items()}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    write_data(folder / "few.jsonl", 8, seed=2)
    for model, targets in TARGETS.items():
        write_adapters(folder / f"adapters-{model}", folder / model, Lora(4, 8, targets=targets))
    sizes = dict(
        vocab_size=vocabulary(), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    sizes |= dict(num_key_value_heads=2, pad_token_id=None, max_position_embeddings=64)
    write_model(folder / "fused", "Phi3", sizes, torch.Generator().manual_seed(3))
    write_adapters(folder / "adapters-fused", folder / "fused", Lora(4, 8, targets=DENSE))
    generator = torch.Generator().manual_seed(4)
    for name, targets in FAMILIES.items():
        family, config = families.FAMILIES[name]
        write_model(folder / name, family, families.SIZES | config | dict(vocab_size=vocabulary()), generator)
        write_adapters(folder / f"adapters-{name}", folder / name, Lora(3, 6, targets=targets))
    return folder


def words(workspace, model, *more):
    return ["--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", *more]


def started(workspace, model, *more):
    return words(workspace, model, "--lora-from", workspace / f"adapters-{model}", *more)


# ---- against others


ONE_BATCH = ["--train-iters", 1, "--lr", 0, "--min-lr", 0, "--save-interval", 5]


@pytest.fixture(scope="module")
def recorded(workspace):
    few = ["--sft-train", workspace / "few.jsonl"]
    runs = {model: [*started(workspace, model), *few, *ONE_BATCH] for model in (*TARGETS, *FAMILIES, "fused")}
    (found,) = run_ranks(1, record_all, ({k: [str(w) for w in v] for k, v in runs.items()},), 240, megatron=True)
    return found


def assert_like(recorded, expected, tolerance):
    loss, gradients = expected
    ((total, count),) = [tuple(map(sum, zip(*step, strict=True))) for step in recorded["losses"]]
    assert total / count == pytest.approx(loss, rel=tolerance)
    (found,) = recorded["gradients"]
    assert found.keys() == gradients.keys()
    # An expert that no token has chosen has none.
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.8 * len(gradients)
    for name, gradient in gradients.items():
        off = torch.from_numpy(found[name]).double() - gradient.double()
        assert off.norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("model", ["untied", "tied", "fused", "sinks"])
def test_loss_and_gradients_are_those_of_peft(workspace, recorded, model):
    assert_like(
        recorded[model],
        by_peft(workspace / model, workspace / f"adapters-{model}", workspace / "few.jsonl", SEQ_LENGTH),
        1e-5,
    )


@pytest.mark.parametrize("model", [*TARGETS, *FAMILIES, "fused"])
def test_loss_and_gradients_are_those_of_the_merged_weights_in_float64(workspace, recorded, model):
    assert_like(
        recorded[model],
        by_chain_rule(workspace / model, workspace / f"adapters-{model}", workspace / "few.jsonl", SEQ_LENGTH),
        1e-5,
    )


def recorded_at(world_size, workspace, runs):
    """What each rank has recorded: [run by name]."""
    runs = {name: [str(word) for word in run] for name, run in runs.items()}
    return run_ranks(world_size, record_all, (runs,), 240, megatron=True)


def test_what_is_frozen_stays_bit_for_bit(workspace):
    """After four steps: adapters alone have gradients, and a state in the optimizer."""
    runs = {
        "experts": [*started(workspace, "experts"), *ep(2), *DISTRIBUTED_OPTIMIZER, "--weight-decay", 0.5],
        "tied": [*started(workspace, "tied"), *pp(2), "--weight-decay", 0.5],
        "halves": [*started(workspace, "untied"), *tp(2), "--bf16", "--weight-decay", 0.5],
    }
    for rank, found in enumerate(recorded_at(2, workspace, runs)):
        for name, result in found.items():
            assert result["frozen"], (rank, name)
            assert result["trained"] and all(".lora." in key for key in result["trained"]), (rank, name)


# ---- layouts


@pytest.fixture(scope="module")
def results(workspace):
    found = {}
    for size, runs in LAYOUTS.items():
        made = {}
        for name, (model, flags) in runs.items():
            rslora = "--lora-rslora" in flags
            start = words(workspace, model) if rslora else started(workspace, model)
            made[name] = [*start, *flags, "--save-hf", workspace / f"out-{name}"]
        found |= launch(size, made, workspace, 600)
    return found


SHARDED = [name for runs in LAYOUTS.values() for name in runs if " at " in name]


@pytest.mark.parametrize("name", SHARDED)
def test_a_layout_trains_like_one_process(workspace, results, name):
    single = name.split(" at ")[0]
    for tag in (*TAGS, "supervised tokens"):
        got, want = results[name]["scalars"][tag], results[single]["scalars"][tag]
        assert len(got) == TRAIN_ITERS
        for step, (a, b) in enumerate(zip(got, want, strict=True), 1):
            limit = 0 if tag == "supervised tokens" else bound(tag, step)
            assert a == pytest.approx(b, rel=limit, abs=1e-9), (tag, step)
    model = name.split(" ")[0]
    got, want = factors(workspace / f"out-{name}"), factors(workspace / f"out-{single}")
    before = factors(workspace / f"adapters-{model}")
    assert got.keys() == want.keys() == before.keys()
    for tensor, expected in want.items():
        # Adam's steps divide by the gradient's size: what is rounded in a small one is large in its step.
        assert (got[tensor] - expected).norm() <= 2e-3 * (expected - before[tensor]).norm(), tensor
        assert not torch.equal(expected, before[tensor]), f"{tensor} was not trained"


def test_the_model_without_adapters_is_the_live_teacher(workspace):
    """Loss and gradients at tensor, sequence and virtual pipeline parallelism, on every rank."""
    flags = [*tp(2), *SEQUENCE_PARALLEL, *VIRTUAL, "--micro-batch-size", 2, "--train-iters", 2]
    live = [*SELF[:-1], "--teacher-hf", workspace / "untied"]
    runs = {name: [*started(workspace, "untied"), *more, *flags] for name, more in (("self", SELF), ("live", live))}
    for rank, found in enumerate(recorded_at(4, workspace, runs)):
        own, second = found["self"], found["live"]
        for ours, theirs in zip(own["losses"], second["losses"], strict=True):
            for (a, count), (b, expected) in zip(ours, theirs, strict=True):
                assert count == expected and a == pytest.approx(b, rel=1e-6), rank
        for ours, theirs in zip(own["gradients"], second["gradients"], strict=True):
            assert ours.keys() == theirs.keys() != set()
            for name, gradient in theirs.items():
                off = torch.from_numpy(ours[name] - gradient).norm()
                assert off <= 1e-6 * torch.from_numpy(gradient).norm(), (rank, name)


def test_the_model_as_its_own_teacher_takes_no_second_weights(workspace, results):
    live = [*SELF[:-1], "--teacher-hf", workspace / "untied"]
    (found,) = launch(1, {"live": [*started(workspace, "untied"), *live]}, workspace).values()
    weights = sum(tensor.nbytes for tensor in tensors(workspace / "untied").values()) / 2**20
    own, second = (run["scalars"]["teacher MiB"] for run in (results["untied self"], found))
    # The vocabulary is padded; what else is there are the hidden states of a micro-batch, in both.
    assert min(b - a for a, b in zip(own, second, strict=True)) == pytest.approx(weights, rel=0.1)
    assert max(own) < 0.1 * weights


def test_adapters_that_add_nothing_change_nothing(workspace):
    """B is 0 at first: the first loss, and the whole evaluation, have the bits of the model without adapters."""
    more = ["--train-iters", 1, "--sft-valid", workspace / "few.jsonl"]
    runs = {"plain": words(workspace, "untied", *more), "lora": words(workspace, "untied", *more, "--lora-rank", 4)}
    runs["skip plain"], runs["skip lora"] = ([*run, "--skip-train"] for run in runs.values())
    found = launch(1, runs, workspace)
    assert found["lora"]["scalars"]["lm loss"] == found["plain"]["scalars"]["lm loss"]
    losses = [re.findall(r"lm loss value: (\S+)", found[f"skip {name}"]["printed"]) for name in ("plain", "lora")]
    assert losses[0] == losses[1] != []


def test_dropout_is_the_same_on_ranks_that_hold_the_same(workspace):
    """What is replicated stays so: a checkpoint compares all copies when it is loaded."""
    dropped = ["--lora-dropout", 0.3, *DISTRIBUTED_OPTIMIZER, "--save-interval", 2]
    for name, flags in {"tp": tp(2), "sp": [*tp(2), *SEQUENCE_PARALLEL]}.items():
        save = ["--save", workspace / f"dropped-{name}"]
        start = [*started(workspace, "untied", *dropped, *flags, *save), "--exit-interval", 2]
        again = [*words(workspace, "untied"), *trained_words(Lora(4, 8, targets=DENSE)), *dropped, *flags, *save]
        launch(2, {f"start {name}": start}, workspace)
        (found,) = launch(2, {name: [*again, "--load", workspace / f"dropped-{name}"]}, workspace).values()
        assert "bit for bit" in found["printed"], found["printed"][-2000:]


# ---- checkpoints and exports


@pytest.fixture(scope="module")
def saved(workspace, results):
    """A training that was ended after 2 steps at one layout, and went on at another."""
    lora = trained_words(Lora(4, 8, targets=TARGETS["experts"]))
    save = ["--save", workspace / "saved", "--save-interval", 2, *DISTRIBUTED_OPTIMIZER]
    first = {"start": [*started(workspace, "experts", *save), "--exit-interval", 2, *ep(2)]}
    launch(2, first, workspace)
    more = [*tp(2), *SEQUENCE_PARALLEL, *pp(2), *ep(2, 1), "--load", workspace / "saved"]
    go_on = {"resumed": [*words(workspace, "experts", *lora, *save), *more, "--save-hf", workspace / "resumed"]}
    return launch(4, go_on, workspace)["resumed"]


def test_a_training_goes_on_at_another_layout(workspace, results, saved):
    assert "bit for bit" in saved["printed"]
    got, want = factors(workspace / "resumed"), factors(workspace / "out-experts")
    before = factors(workspace / "adapters-experts")
    for tensor, expected in want.items():
        assert (got[tensor] - expected).norm() <= 2e-3 * (expected - before[tensor]).norm(), tensor


def test_a_checkpoint_holds_adapters_alone(workspace, saved):
    from torch.distributed.checkpoint import FileSystemReader

    names = FileSystemReader(workspace / "saved" / "iter_0000004").read_metadata().state_dict_metadata
    of_model = {name for name in names if name.startswith(("decoder.", "embedding.", "output_layer."))}
    states = {name for name in names if ".exp_avg" in name or "fp32_param" in name}
    assert of_model and states and all(".lora." in name for name in of_model | states)


@pytest.fixture(scope="module")
def exported(workspace, saved):
    def tools(name, *flags, model="experts"):
        argv = ["export", "--hf-model", workspace / model, "--load", workspace / "saved", "--save-hf", workspace / name]
        return [*argv, *flags]

    shutil.copytree(workspace / "experts", workspace / "experts-changed")
    (file,) = (workspace / "experts-changed").glob("*.safetensors")
    changed = tensors(workspace / "experts-changed")
    changed["model.norm.weight"] *= 2
    save_file(changed, file, metadata={"format": "pt"})
    runs = {"again": tools("again", *pp(2)), "merged": tools("merged", "--lora-merge", *tp(2))}
    # On one rank: where several are refused, one of them waits.
    refused = {"other": tools("other", model="experts-changed"), "foreign": tools("foreign", model="untied")}
    found = {}
    for size, of_size in ((2, runs), (1, refused)):
        words = {name: [str(word) for word in argv] for name, argv in of_size.items()}
        found |= run_ranks(size, run_tools, (words,), 240, megatron=True)[0]
    return found


def run_tools(runs):
    return {name: run_tool("convert_hf", argv) for name, argv in runs.items()}


def test_a_checkpoint_is_exported_at_another_layout(workspace, exported):
    assert exported["again"][0] == 0, exported["again"][1]
    got, want = factors(workspace / "again"), factors(workspace / "resumed")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_merged_weights_are_those_of_the_model_with_the_adapters_added(workspace, exported):
    assert exported["merged"][0] == 0, exported["merged"][1]
    merged, base, added = tensors(workspace / "merged"), tensors(workspace / "experts"), factors(workspace / "resumed")
    assert merged.keys() == base.keys()
    changed = 0
    for name, weight in base.items():
        first, second = (f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight" for f in "AB")
        expected = weight
        if first in added:
            expected, changed = weight.double() + 2 * added[second].double() @ added[first].double(), changed + 1
        torch.testing.assert_close(merged[name].double(), expected.double(), rtol=1e-6, atol=1e-7)
    assert 2 * changed == len(added)


@pytest.mark.parametrize("model", ["untied", "tied", "sinks", "fused", "latent", "weighted"])
def test_peft_loads_what_was_exported(workspace, results, recorded, model):
    """Logits of peft on the base are those of the adapters merged by hand."""
    import transformers
    from peft import PeftModel

    if model == "fused":
        out = workspace / "adapters-fused"
    elif model == "latent":
        # PEFT takes names of shared experts for those of experts; attention it knows.
        out = write_adapters(workspace / "attention", workspace / "latent", Lora(4, 8))
    else:
        out = workspace / f"out-{model}" if model != "weighted" else workspace / "adapters-weighted"
    # Grouped products know no float64.
    how = dict(dtype=torch.float64, experts_implementation="eager")
    base, merged = (transformers.AutoModelForCausalLM.from_pretrained(workspace / model, **how) for _ in range(2))
    added = factors(out)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            first, second = (f"base_model.model.{name.removesuffix('.weight')}.lora_{f}.weight" for f in "AB")
            if first in added:
                parameter += 2 * added[second].double() @ added[first].double()
        adapted = PeftModel.from_pretrained(base, out)
        tokens = torch.arange(3, 35)[None]
        found, expected = adapted(tokens).logits, merged(tokens).logits
    assert (found - expected).abs().max() <= 1e-5
    with torch.no_grad(), adapted.disable_adapter():
        assert (adapted(tokens).logits - expected).abs().max() > 1e-2


def test_what_peft_does_not_load_is_said(workspace, results):
    for name, expected in {"weighted": None, "latent": None, "untied": None, "experts": None}.items():
        assert ("PEFT with transformers 5 does not load" in results[name]["printed"]) == (expected is not None), name
    more = ["--train-iters", 1, "--lora-rank", 2, "--save-hf"]
    runs = {
        "mlp": words(workspace, "latent", *more, workspace / "mlp", "--lora-targets", "q", "gate"),
        "qwen2": words(workspace, "weighted", *more, workspace / "qwen2", "--lora-targets", "q", "experts"),
        "whole": words(workspace, "latent", *more, workspace / "whole", "--lora-targets", "q", "gate", "--lora-merge"),
    }
    found = launch(1, runs, workspace)
    assert "does not load the adapters of gate in a deepseek_v3 model" in found["mlp"]["printed"]
    assert "does not load the adapters of experts in a qwen2_moe model" in found["qwen2"]["printed"]
    assert "does not load" not in found["whole"]["printed"]
    assert (workspace / "whole" / "config.json").is_file()


# ---- bad input


def test_adapters_of_other_weights_are_refused(workspace, exported):
    code, printed = exported["other"]
    assert code == 2
    assert "its adapters were trained on other weights than those of --hf-model" in printed
    assert not (workspace / "other").exists()
    code, printed = exported["foreign"]
    assert code == 2 and "is not a checkpoint of the model in" in printed


@pytest.fixture(scope="module")
def refused(workspace, saved, exported):
    target = [*SELF[:-1]]
    lora = ["--lora-rank", 4]
    whole = {"whole": [*words(workspace, "untied"), "--save", workspace / "whole-saved", "--train-iters", 1]}
    launch(1, whole, workspace)
    load = ["--load", workspace / "saved"]
    runs = {
        "unknown target": words(workspace, "untied", *lora, "--lora-targets", "q", "qkv"),
        "no such layer": words(workspace, "untied", *lora, "--lora-targets", "experts"),
        "part of one": words(workspace, "fused", *lora, "--lora-targets", "q", "v"),
        "self without adapters": words(workspace, "untied", *target, "--teacher-self"),
        "alpha without rank": words(workspace, "untied", "--lora-alpha", 8),
        "merge without rank": words(workspace, "untied", "--lora-merge"),
        "two teachers": words(workspace, "untied", *lora, *SELF, "--teacher-hf", workspace / "untied"),
        "needless self": words(workspace, "untied", *lora, "--teacher-self"),
        "no teacher": words(workspace, "untied", *lora, *target),
        "heads": words(workspace, "untied", *lora, "--mtp-num-layers", 1),
        "bias of experts": words(workspace, "latent", *lora, "--moe-router-bias-update-rate", 0.1),
        "other model": words(workspace, "tied", "--lora-from", workspace / "adapters-untied"),
        "other rank": started(workspace, "untied", "--lora-rank", 8),
        "other base": words(workspace, "experts-changed", "--lora-from", workspace / "resumed"),
        "whole model": words(workspace, "untied", *lora, "--load", workspace / "whole-saved", "--finetune"),
        "no adapters asked for": words(workspace, "experts", *load, "--finetune"),
        "other adapters": words(workspace, "experts", *lora, *load, "--finetune"),
        "adapters as teacher": words(
            workspace, "experts", *target, "--teacher-hf", workspace / "experts", "--teacher-load", workspace / "saved"
        ),
    }
    arguments = {name: [str(word) for word in run] for name, run in runs.items()}
    return run_ranks(1, run_all, (arguments, str(workspace)), 300, megatron=True)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "unknown target": "--lora-targets: expected some of q, k, v, o, gate, up, down, experts, got qkv",
        "no such layer": "--lora-targets experts: it has no such layer in a llama model: drop it",
        "part of one": "a phi3 model has one projection for q, k, v: give all of them, or none",
        "self without adapters": "--teacher-self needs adapters.*the weights move.*--lora-rank.*--teacher-hf",
        "alpha without rank": "--lora-alpha needs adapters: give --lora-rank, or drop it",
        "merge without rank": "--lora-merge needs adapters: give --lora-rank, or drop it",
        "two teachers": "expected one second model: drop --teacher-hf or --teacher-self",
        "needless self": "objective sft.* reads no second model: drop --teacher-self",
        "no teacher": "reads a second model: give --teacher-hf DIR or --teacher-cache DIR or --teacher-self",
        "heads": "--mtp-num-layers does not go with adapters",
        "bias of experts": "--moe-router-bias-update-rate does not go with adapters",
        "other model": "these are the adapters of another model|those of another model",
        "other rank": "--lora-rank: --lora-from .* has 4: drop the flag, or give the same",
        "other base": "--lora-from .*: its adapters were trained on other weights than those of --hf-model",
        "whole model": "holds a whole model, no adapters: .*qtarget export",
        "no adapters asked for": "holds adapters, no model: give --lora-rank 4 --lora-alpha 8 --lora-targets q o exp",
        "other adapters": "other adapters than --lora-rank 4 --lora-alpha 32 .* give --lora-rank 4 --lora-alpha 8",
        "adapters as teacher": "--teacher-load .* holds adapters, no model: export it",
    }.items(),
)
def test_bad_input_is_refused_in_a_line(refused, name, message):
    assert refused[name]["code"] == 2, refused[name]["printed"][-2000:]
    (line,) = [line for line in refused[name]["printed"].splitlines() if "error:" in line]
    assert re.search(message, line), line


def test_the_layout_of_a_training_with_adapters_can_be_verified(workspace):
    argv = [sys.executable, "-m", "qtarget_megatron.verify", "--train", *words(workspace, "experts", "--lora-rank", 4)]
    argv += ["--lr", 1e-4, "--train-iters", 1, *SELF, "--lora-targets", "q", "v", "o", "experts"]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "lora_A" in done.stdout and "one rank" in done.stdout
