"""Conversion in both directions at parallel layouts, and the check that it computes the same."""

import json
import re
import shutil

import pytest
import torch
from checkpoint_models import assert_same_bits
from conversion_runs import (
    TOLERANCE,
    checkpoint_names,
    only,
    read_tensors,
    run_all,
    transformers_logits,
    variant,
)
from finetune_runs import COMMON, write_data, write_models
from launching import run_ranks
from quantized_models import stands_for, write_fp8
from safetensors.torch import load_file, save_file

from tools.first_hour.families import FAMILIES, VOCAB, write_model

# The first test of a launch waits for all of its jobs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1200)]

# One model of each kind, and of some kinds the other tie as well.
_TIED = ("llama2", "llama3", "qwen2", "qwen3", "qwen3_moe", "mistral_window", "smollm3", "phi3", "biases")
COMPARED_MODELS = [f"{family}-{'tied' if family in _TIED else 'untied'}" for family in FAMILIES]
OTHER_TIES = ["llama2-untied", "llama3-untied", "qwen2-untied", "qwen3-untied"]
MODELS = {name: (name.split("-")[0], name.endswith("-tied")) for name in COMPARED_MODELS + OTHER_TIES}
WITH_EXPERTS = [name for name in COMPARED_MODELS if "num_experts_per_tok" in FAMILIES[MODELS[name][0]][1]]
# Padding to a multiple of the tensor-parallel size only: 131 rows at one rank, 132 at two.
PADDING = ["--make-vocab-size-divisible-by", 1]
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]
EP2, ETP1 = ["--expert-model-parallel-size", 2], ["--expert-tensor-parallel-size", 1]
# Every family is there as either class.
GPT, HYBRID = ["--model-class", "gpt"], ["--model-class", "hybrid"]
LAYOUTS = {
    1: {"single": GPT},
    2: {
        "tp2": [*TP2, *HYBRID],
        "pp2": [*PP2, *GPT],
        "tp2-sp": [*TP2, "--sequence-parallel", *GPT],
        "pp2-vpp2": [*PP2, *VPP2, *HYBRID],
        "ep2": [*EP2, *HYBRID],
        "tp2-ep2": [*TP2, *EP2, *ETP1, *GPT],
    },
    4: {
        "tp2-pp2": [*TP2, *PP2, *GPT],
        "tp2-ep2-etp2": [*TP2, *EP2, *HYBRID],
        "tp2-pp2-ep2": [*TP2, *PP2, *EP2, *ETP1, *HYBRID],
    },
}
DENSE = [layout for layout in LAYOUTS[2] if "ep2" not in layout]
# Sequence parallelism cuts no weights, and every model is cut into stages at TP2 x PP2 and with virtual ones: a few
# models will do.
# Families that are declarations of what others have too need one process and one layout of several ranks.
ALIKE = ["glm-untied", "seed_oss-untied", "ernie4_5-untied"]
FEW = ["llama3-tied", "qwen2-untied", "qwen3-tied", "qwen3_moe-tied"]
MODELS_AT = dict.fromkeys(("tp2-sp", "pp2"), FEW)
MODELS_AT |= dict.fromkeys(("tp2", "pp2-vpp2"), [name for name in COMPARED_MODELS if name not in ALIKE])
COMPARED = [
    (world, layout, name)
    for world, layouts in LAYOUTS.items()
    for layout in layouts
    for name in (WITH_EXPERTS if "ep2" in layout else MODELS_AT.get(layout, COMPARED_MODELS))
    if (layout, name) != ("tp2-ep2-etp2", "gpt_oss-untied")
]
# Imported and exported: ties, biases, qk norms, a shared key/value head, fused tensors, both dtypes, experts in some or
# all layers.
ROUND_TRIPS = ["llama3-untied", "qwen2-tied", "qwen3-untied", "phi3-tied", "glm4-untied", "biases-tied"]
ROUND_TRIPS += ["mistral-bf16"]
SPREAD = ["qwen3_moe-tied", "qwen3_moe_normalized-untied", "mixtral-untied", "deepseek_v3-bf16", "deepseek_v3-fp8"]
SPREAD += ["gpt_oss-bf16"]
ROUND_TRIPS += SPREAD


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conversion")
    for name, (family, tied) in MODELS.items():
        write_model(folder / name, family, tied=tied)
    for family in ("mistral", "deepseek_v3", "gpt_oss"):
        write_model(folder / f"{family}-bf16", family, tied=False, dtype=torch.bfloat16)
    stands_for(folder / "deepseek_v3-fp8", write_fp8(folder / "deepseek_v3-bf16", folder / "deepseek_v3-fp8"))
    write_model(folder / "wide", "llama2", tied=False, hidden_size=96, num_key_value_heads=3)
    # With a tokenizer: "tied", "untied" and "teacher".
    write_models(folder)
    write_data(folder / "train.jsonl", 8, seed=1)
    stands_for(folder / "latent-fp8", write_fp8(folder / "latent", folder / "latent-fp8", model_type="kimi_k2"))
    good = folder / "untied"
    variant(good, folder / "other-weights", tensors=lambda w: [t.mul_(0.5) for t in w.values()])
    variant(good, folder / "swapped", tensors=swap_gate_and_up)
    variant(good, folder / "overflow", tensors=lambda w: w["model.norm.weight"].fill_(3e38))
    rope = {"rope_type": "default", "rope_theta": 20000.0}
    variant(good, folder / "wrong-theta", rope_parameters=rope)
    variant(good, folder / "wrong-eps", rms_norm_eps=1e-4)
    experts = folder / "experts"
    variant(experts, folder / "swapped-experts", tensors=swap_experts)
    variant(experts, folder / "other-normalisation", norm_topk_prob=True)
    variant(good, folder / "unknown", architectures=["GPT2LMHeadModel"])
    weights = variant(good, folder / "truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    variant(good, folder / "int8", tensors=lambda w: w.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)}))
    linked = variant(good, folder / "linked") / "model.safetensors"
    linked.unlink()
    linked.symlink_to(good / "model.safetensors")
    twice = folder / "twice"
    shutil.copytree(folder / "llama2-untied", twice)
    first, second = sorted(twice.glob("*.safetensors"))[:2]
    save_file(load_file(first) | {min(load_file(second)): torch.zeros(1)}, first)
    sharded = folder / "missing-shard"
    shutil.copytree(folder / "llama2-untied", sharded)
    min(sharded.glob("*.safetensors")).unlink()
    (folder / "occupied").mkdir()
    (folder / "occupied" / "notes").write_text("mine")
    (folder / "empty.txt").write_text("")
    return folder


def swap_gate_and_up(weights):
    gate, up = (f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up"))
    weights[gate], weights[up] = weights[up], weights[gate]


def swap_experts(weights):
    for part in ("gate", "up", "down"):
        first, second = (f"model.layers.1.mlp.experts.{expert}.{part}_proj.weight" for expert in (1, 2))
        weights[first], weights[second] = weights[second], weights[first]


def launch(world_size, jobs, timeout=420):
    """Results of every rank, by job."""
    jobs = {name: tuple(map(str, job)) for name, job in jobs.items()}
    results = run_ranks(world_size, run_all, (jobs,), timeout, megatron=True)
    return {name: [result[name] for result in results] for name in jobs}


def of_experts(name):
    """Experts with biases are not cut."""
    return ETP1 if name.startswith("gpt_oss") else []


def logits_jobs(workspace, world_size):
    return {
        f"logits {name} {layout}": ("logits", workspace / name, *PADDING, *LAYOUTS[world][layout], *of_experts(name))
        for world, layout, name in COMPARED
        if world == world_size
    }


def bad_inputs(workspace):
    """Words of the command line, and what the error must say."""
    new, good, ckpt = workspace / "never", workspace / "untied", workspace / "ckpt-untied"

    def importing(name, *words):
        return ["import", "--hf-model", workspace / name, "--save", new, *words]

    def exporting(name, *words):
        return ["export", "--hf-model", workspace / name, "--save-hf", new, *words]

    def checking(*words):
        return ["check", "--hf-model", good, *words]

    occupied = ["export", "--hf-model", good, "--load", ckpt, "--save-hf", workspace / "occupied"]
    return {
        "occupied save": (["import", "--hf-model", good, "--save", workspace / "occupied"], "files in it"),
        "occupied save-hf": (occupied, "files in it"),
        "unknown architecture": (importing("unknown"), "GPT2LMHeadModel"),
        "missing shard": (importing("missing-shard"), "model-00001-of-"),
        "truncated": (importing("truncated"), "truncated"),
        "wrong dtype": (importing("int8"), "expected a 16 or 32 bit float, got torch.int8"),
        "link out of the directory": (importing("linked"), "got a link to"),
        "tensor in two shards": (importing("twice"), "expected each tensor once"),
        "no such directory": (importing("Qwen/Qwen2.5-1.5B"), "expected a checkpoint directory, found none"),
        "a file": (importing("untied/config.json"), "expected a checkpoint directory, found a file"),
        "a checkpoint as a model": (importing("ckpt-untied"), "expected a config.json"),
        "a model as a checkpoint": (exporting("untied", "--load", good), "expected a Megatron checkpoint"),
        "no place for checksums": (
            [*exporting("untied", "--load", ckpt), "--checksums", workspace / "none" / "sums"],
            "--checksums",
        ),
        "heads": (importing("untied", "--tensor-model-parallel-size", 3), "3 does not divide the 4 attention heads"),
        "layers": (importing("untied", "--pipeline-model-parallel-size", 3), "3 does not divide the 4 layers"),
        "biases": (importing("gpt_oss-untied", *TP2), "give --expert-tensor-parallel-size 1"),
        "processes": (importing("untied", *TP2), "--nproc-per-node 2"),
        "architecture flag": (importing("untied", "--num-layers", 2), "--num-layers follow"),
        "load while importing": (importing("untied", "--load", ckpt), "--load has no meaning"),
        "format": (importing("untied", "--ckpt-format", "torch"), "torch_dist"),
        "no checkpoint": (exporting("untied", "--load", workspace), "latest_checkpointed_iteration.txt"),
        "wider model": (exporting("wide", "--load", ckpt), "not a checkpoint of"),
        "tied model": (exporting("tied", "--load", ckpt), "not a checkpoint of"),
        "other epsilon": (exporting("wrong-eps", "--load", ckpt), "rms_norm_eps 0.0001 by config.json"),
        "no text": (checking("--text", workspace / "none.txt"), "expected a UTF-8 text file"),
        "empty text": (checking("--text", workspace / "empty.txt"), "at least one token"),
        "no reference": (checking("--reference", workspace / "occupied"), "transformers cannot load"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def one(workspace):
    """A single process: imports and exports, checks with their negative controls, bad input."""
    jobs = logits_jobs(workspace, 1)
    for name in [*ROUND_TRIPS, "llama2-untied", "untied"]:
        source, ckpt = ("--hf-model", workspace / name), workspace / f"ckpt-{name}"
        jobs[f"import {name}"] = ("convert", "import", *source, "--save", ckpt, *PADDING)
        words = ["export", *source, "--load", ckpt, "--save-hf", workspace / f"back-{name}"]
        jobs[f"export {name}"] = ("convert", *words, *PADDING)
    good, ckpt = workspace / "untied", workspace / "ckpt-untied"
    jobs["check"] = ("convert", "check", "--hf-model", good)
    jobs["check load"] = ("convert", "check", "--hf-model", good, "--load", ckpt)
    for name in ("wrong-theta", "wrong-eps", "swapped", "overflow"):
        words = ["check", "--hf-model", workspace / name, "--reference", good]
        jobs[f"check {name}"] = ("convert", *words)
    experts = ("convert", "check", "--reference", workspace / "experts", "--hf-model")
    for name in ("experts", "swapped-experts", "other-normalisation"):
        jobs[f"check {name}"] = (*experts, workspace / name)
    jobs["check fp8"] = ("convert", "check", "--hf-model", workspace / "latent-fp8")
    words = ["check", "--hf-model", workspace / "swapped", "--reference", good]
    jobs["printed check"] = ("convert_output", *words)
    words = ["import", "--hf-model", good, "--save", workspace / "ckpt-printed"]
    jobs["printed import"] = ("convert_output", *words)
    words = ["export", "--hf-model", good, "--load", ckpt, "--save-hf", workspace / "back-printed"]
    jobs["printed export"] = ("convert_output", *words)
    jobs["check load swapped"] = (
        "convert",
        "check",
        "--hf-model",
        workspace / "swapped",
        "--load",
        ckpt,
    )
    jobs["agreement"] = ("agreement", workspace / "llama3-untied", workspace / "llama3-tied")
    plain = workspace / "ckpt-llama2-untied"
    jobs["plain"] = ("plain_megatron", workspace / "llama2-untied", plain)
    jobs["own state"] = ("layers_with_own_state", workspace / "llama2-untied", plain)
    for name, (words, _) in bad_inputs(workspace).items():
        jobs[f"bad {name}"] = ("convert", *words)
    return launch(1, jobs)


@pytest.fixture(scope="module")
def four(workspace, one):
    """TP2 x PP2: imports there, and exports of what one process imported."""
    jobs = logits_jobs(workspace, 4)
    for name in ROUND_TRIPS:
        layout = LAYOUTS[4]["tp2-pp2-ep2" if name in SPREAD else "tp2-pp2"]
        source = ("--hf-model", workspace / name)
        words = [*source, "--save", workspace / f"ckpt4-{name}", *PADDING, *layout]
        jobs[f"import {name}"] = ("convert", "import", *words)
        words = [*source, "--load", workspace / f"ckpt-{name}", *PADDING, *layout]
        jobs[f"export {name}"] = (
            "convert",
            "export",
            *words,
            "--save-hf",
            workspace / f"back4-{name}",
        )
    jobs["bytes"] = ("bytes_read", workspace / "llama2-untied", *PADDING, *LAYOUTS[4]["tp2-pp2"])
    return launch(4, jobs)


@pytest.fixture(scope="module")
def two(workspace, four):
    """Two ranks: exports at TP1 x PP1 of what four imported, and fine-tuning from a checkpoint."""
    jobs = logits_jobs(workspace, 2)
    for name in ROUND_TRIPS:
        words = ["--hf-model", workspace / name, "--load", workspace / f"ckpt4-{name}"]
        out = workspace / f"back41-{name}"
        jobs[f"export {name}"] = ("convert", "export", *words, "--save-hf", out)
    for layout in DENSE:
        words = LAYOUTS[2][layout]
        good = ["--hf-model", workspace / "untied", "--load", workspace / "ckpt-untied"]
        jobs[f"check {layout}"] = ("convert", "check", *good, *words)
        swapped = ["--hf-model", workspace / "swapped", "--reference", workspace / "untied"]
        jobs[f"check swapped {layout}"] = ("convert", "check", *swapped, *words)
    experts = ("convert", "check", "--reference", workspace / "experts", "--hf-model")
    for name in ("experts", "swapped-experts"):
        jobs[f"check {name} ep2"] = (*experts, workspace / name, *EP2)
    jobs["incomplete ep2"] = ("incomplete", workspace / "mixtral-untied", *EP2)
    jobs["bytes ep2"] = ("bytes_read", workspace / "mixtral-untied", *PADDING, *EP2)
    jobs["incomplete pp2"] = ("incomplete", workspace / "llama2-tied", *PP2)
    jobs["incomplete pp2-vpp2"] = ("incomplete", workspace / "llama2-tied", *PP2, *VPP2)
    words = ["--hf-model", workspace / "other-weights", "--sft-train", workspace / "train.jsonl"]
    words += ["--load", workspace / "ckpt-untied", "--finetune", "--save-hf", workspace / "tuned"]
    # Without a learning rate the export is what was loaded.
    still = ["--train-iters", 1, "--lr", 0, "--min-lr", 0]
    jobs["finetune"] = ("finetune", *COMMON, *words, *PP2, *still)
    fp8 = workspace / "latent-fp8"
    words = ["--hf-model", fp8, "--sft-train", workspace / "train.jsonl", "--save-hf", workspace / "tuned-fp8"]
    words += ["--objective", "target-sft", "--teacher-hf", fp8]
    jobs["finetune fp8"] = ("finetune", *COMMON, *words, *PP2, *still)
    return launch(2, jobs)


@pytest.fixture(scope="module")
def expected_logits(workspace):
    """Logits by transformers, float64."""
    return {name: transformers_logits(workspace / name) for name in MODELS}


@pytest.mark.parametrize(("world", "layout", "name"), COMPARED)
def test_megatron_computes_what_transformers_computes(request, expected_logits, world, layout, name):
    results = request.getfixturevalue({1: "one", 2: "two", 4: "four"}[world])
    actual, expected = only(results[f"logits {name} {layout}"]), expected_logits[name]
    assert actual.shape == (64, VOCAB)
    assert expected.abs().max() > 1
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ROUND_TRIPS)
@pytest.mark.parametrize("folder", ["back", "back4", "back41"])
def test_import_and_export_give_back_every_bit(request, workspace, name, folder):
    """back: both by one process; back4: export at TP2 x PP2; back41: import at TP2 x PP2."""
    results = request.getfixturevalue({"back": "one", "back4": "four", "back41": "two"}[folder])
    assert [code for code, _ in results[f"export {name}"]] == [0] * len(results[f"export {name}"])
    out = workspace / f"{folder}-{name}"
    source = workspace / (f"{name}-stands-for" if name.endswith("-fp8") else name)
    expected = read_tensors(source)
    assert_same_bits(read_tensors(out), expected)
    dtype = torch.bfloat16 if name.endswith(("-bf16", "-fp8")) else torch.float32
    apart = {key: tensor for key, tensor in expected.items() if key.endswith("e_score_correction_bias")}
    assert {tensor.dtype for key, tensor in expected.items() if key not in apart} == {dtype}
    assert {tensor.dtype for tensor in apart.values()} <= {torch.float32}
    assert len(apart) == (3 if name.startswith("deepseek_v3") else 0)
    assert (out / "config.json").read_bytes() == (source / "config.json").read_bytes()


def test_each_rank_reads_about_its_share(workspace, four):
    total = sum(t.nbytes for t in read_tensors(workspace / "llama2-untied").values())
    assert sum(four["bytes"]) >= total
    # Norms are read by every tensor-parallel rank.
    assert max(four["bytes"]) <= 1.05 * total / 4


def test_each_rank_reads_its_experts_only(workspace, two):
    tensors = read_tensors(workspace / "mixtral-untied")
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if ".experts." in name)
    shared = sum(tensor.nbytes for tensor in tensors.values()) - experts
    assert two["bytes ep2"] == [shared + experts // 2] * 2


def test_plain_megatron_reads_the_checkpoint(one, expected_logits):
    assert (only(one["plain"]) - expected_logits["llama2-untied"]).abs().max() <= TOLERANCE


def test_fine_tuning_starts_from_the_checkpoint_and_not_from_the_directory(workspace, two):
    assert [code for code, _ in two["finetune"]] == [0, 0], two["finetune"][0][1][-3000:]
    assert "starting from the checkpoint in" in two["finetune"][0][1]
    assert_same_bits(read_tensors(workspace / "tuned"), read_tensors(workspace / "untied"))


def test_fine_tuning_takes_a_quantized_model_and_teacher(workspace, two):
    assert [code for code, _ in two["finetune fp8"]] == [0, 0], two["finetune fp8"][0][1][-3000:]
    expected = read_tensors(workspace / "latent-fp8-stands-for")
    found = read_tensors(workspace / "tuned-fp8")
    assert_same_bits(found, {name: tensor.to(found[name].dtype) for name, tensor in expected.items()})
    assert "quantization_config" not in json.loads((workspace / "tuned-fp8" / "config.json").read_text())


def test_a_checkpoint_has_the_names_of_transformer_engine_layers(workspace, one, four):
    """Norms are named as parts of the linear layer behind them, so that both layer kinds load it."""
    layer = [
        *("self_attention.linear_proj.weight", "self_attention.linear_qkv.layer_norm_weight"),
        *("self_attention.linear_qkv.weight", "mlp.linear_fc1.layer_norm_weight"),
        *("mlp.linear_fc1.weight", "mlp.linear_fc2.weight"),
    ]
    names = {f"decoder.layers.{name}" for name in layer} | {
        *("embedding.word_embeddings.weight", "decoder.final_layernorm.weight"),
    }
    norms = {f"decoder.layers.self_attention.{part}_layernorm.weight" for part in "qk"}
    qwen3 = names | norms | {"output_layer.weight"}
    assert checkpoint_names(workspace / "ckpt-qwen3-untied") == qwen3
    assert checkpoint_names(workspace / "ckpt4-qwen3-untied") == qwen3
    mixtral = names - {f"decoder.layers.mlp.{part}" for part in (
        "linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight"
    )} | {f"decoder.layers.{part}" for part in (
        "pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.experts.experts.linear_fc1.weight",
        "mlp.experts.experts.linear_fc2.weight",
    )}  # fmt: skip
    mixtral.add("output_layer.weight")
    assert checkpoint_names(workspace / "ckpt-mixtral-untied") == mixtral
    assert checkpoint_names(workspace / "ckpt4-mixtral-untied") == mixtral
    parts = [f"linear_{part}_{way}_proj" for part in ("q", "kv") for way in ("down", "up")]
    attention = {f"self_attention.{part}.weight" for part in (*parts, "linear_proj")}
    attention |= {f"self_attention.{part}.layer_norm_weight" for part in parts if "_up_" in part}
    linears = {
        f"{part}.linear_fc{number}.weight"
        for number in (1, 2)
        for part in ("mlp.experts.experts", "mlp.shared_experts")
    }
    sparse = attention | linears | {"pre_mlp_layernorm.weight", "mlp.router.weight", "mlp.router.expert_bias"}
    dense = attention | {
        f"mlp.{part}" for part in ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight")
    }
    layers = {0: dense, 1: sparse, 2: sparse, 3: sparse}
    deepseek = {f"decoder.layers.{i}.{name}" for i, own in layers.items() for name in own | {"input_layernorm.weight"}}
    deepseek |= {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    assert checkpoint_names(workspace / "ckpt4-deepseek_v3-bf16") == deepseek
    qwen2 = names | {"decoder.layers.self_attention.linear_qkv.bias"}
    assert checkpoint_names(workspace / "ckpt4-qwen2-tied") == qwen2


def test_layers_with_a_state_of_their_own_need_the_strictness_that_the_help_names(one):
    refused, accepted = one["own state"][0]
    assert "Missing key" in refused and "_extra_state" in refused
    assert accepted == "loaded"


@pytest.mark.parametrize(
    ("job", "code"),
    [
        ("check", 0),
        ("check load", 0),
        ("check wrong-theta", 1),
        ("check wrong-eps", 1),
        ("check swapped", 1),
        ("check overflow", 1),
        ("check load swapped", 1),
        ("check experts", 0),
        ("check swapped-experts", 1),
        ("check fp8", 0),
        ("check other-normalisation", 1),
    ],
)
def test_check_tells_equal_from_different(one, job, code):
    actual, line = one[job][0]
    assert actual == code, line
    assert line.endswith(": equal" if code == 0 else ": DIFFERENT")


def test_check_works_with_experts_on_different_ranks(two):
    assert [code for code, _ in two["check experts ep2"]] == [0, 0]
    assert [code for code, _ in two["check swapped-experts ep2"]] == [1, 1]


def test_check_prints_where_to_look(one):
    code, printed = one["printed check"][0]
    assert code == 1
    assert "\nworst tokens\nposition " in printed
    verdict, last = printed.splitlines()[-2:]
    assert verdict.startswith("first divergence: layer 1, MLP (") and "gate_proj and up_proj exchanged" in verdict
    assert last.startswith("check: over 64 tokens") and last.endswith(": DIFFERENT")
    # Tokens as text, not as numbers.
    row = printed[printed.index("worst tokens") :].splitlines()[2]
    assert row.count("'") >= 8


@pytest.mark.parametrize("way", ["import", "export"])
def test_conversions_say_how_far_they_are(one, way):
    code, printed = one[f"printed {way}"][0]
    assert code == 0
    doing = {"import": "reading", "export": "writing"}[way]
    lines = [line for line in printed.splitlines() if line.startswith(f"{way}: {doing}: ")]
    size = r"([\d.e-]+)"
    done, total = re.fullmatch(rf"{way}: {doing}: {size}/{size} GB, .* GB/s, 0:00:00 left", lines[-1]).groups()
    assert done == total


@pytest.mark.parametrize("layout", DENSE)
def test_check_works_at_every_layout(two, layout):
    assert [code for code, _ in two[f"check {layout}"]] == [0, 0]
    assert [code for code, _ in two[f"check swapped {layout}"]] == [1, 1]


def test_agreement_is_measured_on_the_logits(workspace, one, expected_logits):
    found, actual = one["agreement"][0]
    actual = torch.from_numpy(actual)
    expected = expected_logits["llama3-tied"]
    p, log_q = expected.double().softmax(-1), actual.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, p, reduction="none").sum(-1)
    assert found["num_tokens"] == 64
    assert found["max_difference"] == pytest.approx((actual - expected).abs().max().item(), abs=1e-5)
    same = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    assert found["argmax_agreement"] == pytest.approx(same) and same < 0.5
    assert found["kl_mean"] == pytest.approx(kl.mean().item(), rel=1e-5)
    assert found["kl_max"] == pytest.approx(kl.max().item(), rel=1e-5)


@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "ep2"])
def test_a_left_out_stage_is_noticed(two, layout):
    first, second = two[f"incomplete {layout}"]
    assert "a plan without" in first and first == second
    assert layout != "ep2" or "experts.2." in first


def test_bad_input_is_one_line_and_writes_nothing(workspace, one):
    for name, (_, message) in bad_inputs(workspace).items():
        code, line = one[f"bad {name}"][0]
        assert code == 2, (name, code, line)
        assert re.match("(import|export|check): error: ", line) and line.count("\n") == 0, name
        assert message in line, (name, line)
    assert not (workspace / "never").exists()
    assert [path.name for path in (workspace / "occupied").iterdir()] == ["notes"]
    assert not list(workspace.glob("*.incomplete*")) + list(workspace.glob(".*incomplete*"))
