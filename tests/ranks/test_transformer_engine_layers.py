"""Megatron's layers for Transformer Engine, on a stand-in for it: they train as Megatron's local ones do.

What the stand-in leaves out is in its docstring, in transformer_engine_stand_in/transformer_engine/__init__.py.
Losses and gradient norms are held to the bounds of noise_floor.py: both do the same sums, in another order in
norms and attention.
"""

import importlib.util
import sys

import pytest
import torch
import transformer_engine_runs
from conversion_runs import TOLERANCE
from finetune_runs import vocabulary, write_data, write_model, write_models
from launching import run_ranks
from layout_runs import (
    DISTRIBUTED_OPTIMIZER,
    SEQUENCE_PARALLEL,
    assert_same_training,
    compare_exports,
    ep,
    launch,
    pp,
    tensors,
    tp,
)
from lora_runs import trained_words, write_adapters
from noise_floor import MARGIN, WEIGHTS_FLOOR, update_difference

from qtarget_megatron.huggingface import Lora
from tools.first_hour import families

# The first test waits for all runs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(700)]

HYBRID = ["--model-class", "hybrid"]
GROUPED = ["--moe-grouped-gemm"]
SHARED = [*tp(2), *SEQUENCE_PARALLEL]
# On two ranks: student and layout -> flags. The reference is the local layers' run of the same name.
LAYOUTS = {
    "untied at DP2": [],
    "untied at TP2": tp(2),
    "untied at TP2 with sequence parallelism": SHARED,
    "tied at TP2 with sequence parallelism": SHARED,
    "tied at PP2": pp(2),
    "biased at TP2 with sequence parallelism": SHARED,
    "experts at DP2": [],
    "experts at EP2": ep(2),
    "latent at DP2": [],
    "untied with adapters at TP2 with sequence parallelism": SHARED,
    "experts with adapters at EP2": ep(2),
    "latent with adapters at DP2": [],
}
# What else Transformer Engine's layers do -> flags, the reference.
MORE = {
    "untied at DP2 with overlapped communication": (
        [*DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 500],
        "untied at DP2",
    ),
    "untied at TP2 with sequence parallelism and recomputation": (
        [*SHARED, "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1],
        "untied at TP2 with sequence parallelism",
    ),
    "tied at PP2 as a hybrid model": ([*pp(2), *HYBRID], "tied at PP2"),
    "grouped experts at EP2 as a hybrid model": ([*ep(2), *GROUPED, *HYBRID], "experts at EP2"),
    "untied at PP2 with two stages a rank": ([*pp(2), "--num-virtual-stages-per-pipeline-rank", 2], "untied at DP2"),
    "grouped experts at DP2": (GROUPED, "experts at DP2"),
    "grouped experts at EP2": ([*ep(2), *GROUPED], "experts at EP2"),
    # Local layers refuse latent attention at TP2.
    "latent at TP2 with sequence parallelism and grouped experts": (
        [*SHARED, *ep(1, 1), *GROUPED],
        "latent at DP2",
    ),
    "latent at TP2 with sequence parallelism and grouped experts as a hybrid model": (
        [*SHARED, *ep(1, 1), *GROUPED, *HYBRID],
        "latent at DP2",
    ),
    "grouped experts with adapters at EP2": ([*ep(2), *GROUPED], "experts with adapters at EP2"),
    "grouped experts with adapters at TP2 and ETP2": ([*SHARED, *ep(1, 2), *GROUPED], "experts with adapters at EP2"),
    # Whole projections to latents on every rank.
    "latent with adapters at TP2 with sequence parallelism and grouped experts": (
        [*SHARED, *ep(1, 1), *GROUPED],
        "latent with adapters at DP2",
    ),
}
ADAPTED = {
    "untied": ("q", "v", "o", "gate", "up", "down"),
    "experts": ("q", "k", "v", "gate", "down", "experts"),
    "latent": ("q", "k", "v", "o", "up", "experts"),
}
# Of first_hour: scaled, partial and interleaved rotary embeddings, windows, layers without, biases, latents; experts,
# with a shared one or biases, sinks; norms behind attention and MLP, multipliers.
FAMILIES = ("llama3", "mistral_window", "qwen2_windows", "smollm3", "phi3", "glm4", "granite", "biases", "mixtral")
FAMILIES += ("deepseek_v3", "qwen2_moe", "gpt_oss")
EXPORTED = [
    "untied at TP2 with sequence parallelism",
    "tied at TP2 with sequence parallelism",
    "tied at PP2",
    "biased at TP2 with sequence parallelism",
    "experts at EP2",
    "grouped experts at EP2",
    "latent at TP2 with sequence parallelism and grouped experts",
]
# Checkpoints of step 2: the folder and the flags they were saved at. Of local layers, and of Transformer Engine's.
STOP = ["--save-interval", 2, "--exit-interval", 2]
SAVED_LOCAL = {"untied": tp(2), "experts": ep(2), "experts with adapters": ep(2)}
SAVED = {"tied": SHARED, "grouped experts": [*ep(2), *GROUPED]}
# What resumes from which of them -> flags, the reference.
RESUMED = {
    "tied resumed at another layout": ("tied", pp(2), "tied at PP2"),
    "grouped experts resumed at another layout": (
        "grouped experts",
        [*SHARED, *ep(2, 1), *GROUPED],
        "experts at EP2",
    ),
    "tied resumed as a hybrid model": ("tied", [*pp(2), *HYBRID], "tied at PP2"),
    "untied resumed from local layers": ("untied", [], "untied at DP2"),
    "grouped experts resumed from local layers' sequential ones": ("experts", [*ep(2), *GROUPED], "experts at EP2"),
    "grouped experts with adapters resumed from local layers' sequential ones": (
        "experts with adapters",
        [*SHARED, *ep(2, 1), *GROUPED],
        "experts with adapters at EP2",
    ),
}
FAULTS = {
    "the gradient of a norm is not summed over the ranks": "untied at TP2 with sequence parallelism",
    "the gradient of an input is that of this rank's columns": "untied at TP2",
    "a norm has another name": "untied at DP2",
}


def commands(workspace):
    """A model to a checkpoint and back at another layout."""
    model, checkpoint = ["--hf-model", workspace / "experts"], workspace / "imported"
    exported = ["--save-hf", workspace / "exported"]
    return {
        "import": ["import", *model, "--save", checkpoint, *ep(2), *GROUPED],
        "export": ["export", *model, "--load", checkpoint, *exported, *SHARED, *ep(1, 1)],
    }


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer-engine")
    write_models(folder)
    biased = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_key_value_heads=2, head_dim=16)
    biased |= dict(vocab_size=vocabulary(), max_position_embeddings=64, num_attention_heads=4)
    biased |= dict(attention_bias=True, mlp_bias=True)
    write_model(folder / "biased", "Llama", biased, torch.Generator().manual_seed(5))
    for family in FAMILIES:
        families.write_model(folder / family, family, tied=False)
    for student, targets in ADAPTED.items():
        write_adapters(folder / f"{student}-adapters", folder / student, Lora(4, 8, targets=targets))
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def words(workspace, name):
    """What is trained, of the student that a run is named after."""
    student = name.removeprefix("grouped ").split()[0]
    flags = ["--hf-model", workspace / student, "--sft-train", workspace / "train.jsonl"]
    if "adapters" in name and "resumed" in name:
        flags += trained_words(Lora(4, 8, targets=ADAPTED[student]))
    elif "adapters" in name:
        flags += ["--lora-from", workspace / f"{student}-adapters"]
    if student == "tied":
        return [
            *flags,
            "--objective",
            "target-sft",
            "--objective-args",
            "eta=0.4",
            "--teacher-hf",
            workspace / "teacher",
        ]
    return [*flags, "--objective", "sft"]


def export(workspace, name, layers):
    return workspace / f"{name}, {layers}"


def saving(workspace, name, flags, layers):
    return [*words(workspace, name), *flags, *DISTRIBUTED_OPTIMIZER, *STOP, "--save", workspace / f"{layers}-{name}"]


@pytest.fixture(scope="module")
def local(workspace):
    """Local layers, where nothing stands in for Transformer Engine."""
    runs = {
        name: [*words(workspace, name), *flags, "--save-hf", export(workspace, name, "local")]
        for name, flags in LAYOUTS.items()
    }
    runs |= {f"{name} saved": saving(workspace, name, flags, "local") for name, flags in SAVED_LOCAL.items()}
    return launch(2, runs, workspace, timeout=240)


@pytest.fixture(scope="module")
def engine(workspace, local):
    """Transformer Engine's layers: the results of the last rank, and how far each family is from transformers."""
    flags = {name: flags for name, (flags, _) in MORE.items()} | LAYOUTS
    runs = {name: [*words(workspace, name), *more] for name, more in flags.items()}
    for name in EXPORTED:
        runs[name] += ["--save-hf", export(workspace, name, "engine")]
    runs |= {f"{name} saved": saving(workspace, name, more, "engine") for name, more in SAVED.items()}
    for name, (saved, more, _) in RESUMED.items():
        folder = workspace / f"{'engine' if saved in SAVED else 'local'}-{saved}"
        runs[name] = [*words(workspace, name), *more, *DISTRIBUTED_OPTIMIZER, "--load", folder]
    runs = {name: (run, None) for name, run in runs.items()}
    runs |= {fault: ([*words(workspace, name), *LAYOUTS[name]], fault) for fault, name in FAULTS.items()}
    runs = {name: ([str(word) for word in run], fault) for name, (run, fault) in runs.items()}
    # A folder of their own: both kinds of layers have runs of one name.
    (workspace / "engine").mkdir()
    tools = {name: ("convert_hf", [str(word) for word in command]) for name, command in commands(workspace).items()}
    grouped = {family: [*ep(1, 1), *GROUPED] for family in ("mixtral", "deepseek_v3", "qwen2_moe", "gpt_oss")}
    models = {family: (str(workspace / family), [*SHARED, *grouped.get(family, [])]) for family in FAMILIES}
    arguments = runs, tools, models, str(workspace / "engine")
    results = run_ranks(2, transformer_engine_runs.run_all, arguments, timeout=300)
    for rank, (trained, converted, _) in enumerate(results):
        for name, result in trained.items():
            expected = (2,) if name == "a norm has another name" else (0, None)
            assert result["code"] in expected, f"{name} on rank {rank}:\n{result['printed'][-3000:]}"
        for name, (code, printed) in converted.items():
            assert code == 0, f"{name} on rank {rank}:\n{printed[-3000:]}"
    trained, _, differences = results[-1]
    return trained | differences


@pytest.mark.parametrize("name", [*LAYOUTS, *MORE])
def test_a_layout_trains_like_local_layers(engine, local, name):
    assert_same_training(engine[name], local[MORE[name][1] if name in MORE else name])


@pytest.mark.parametrize("name", EXPORTED)
def test_what_is_exported_is_what_local_layers_export(workspace, engine, local, name):
    student = name.removeprefix("grouped ").split()[0]
    found = export(workspace, name, "engine")
    expected = export(workspace, MORE[name][1] if name in MORE else name, "local")
    if student != "latent":
        compare_exports(found, expected, workspace / student)
        return
    found, expected, before = tensors(found), tensors(expected), tensors(workspace / student)
    assert found.keys() == expected.keys()
    assert update_difference(found, expected, before) <= MARGIN * WEIGHTS_FLOOR
    # The correction of the router's scores is kept as it is.
    (kept,) = [key for key, tensor in expected.items() if torch.equal(tensor, before[key])]
    assert kept.endswith("e_score_correction_bias") and torch.equal(found[kept], before[kept])


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes(engine, local, name):
    assert_same_training(engine[name], local[RESUMED[name][2]], first_step=2)


def test_local_layers_resume_from_a_checkpoint_of_transformer_engines(workspace, engine, local):
    load = ["--load", workspace / "engine-tied"]
    runs = {"tied": [*words(workspace, "tied"), *pp(2), *DISTRIBUTED_OPTIMIZER, *load]}
    assert_same_training(launch(2, runs, workspace, timeout=120)["tied"], local["tied at PP2"], first_step=2)


def test_a_conversion_gives_the_same_bits_at_another_layout(workspace, engine):
    found, expected = tensors(workspace / "exported"), tensors(workspace / "experts")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_computes_what_transformers_does(engine, family):
    """At TP2, which for latent attention local layers refuse."""
    # Both are float32: transformers' is as far from float64 as TOLERANCE's reason says.
    assert engine[family] <= TOLERANCE + 4.5e-6


def test_the_layers_are_transformer_engines(engine):
    fused = {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
    sequential, grouped = {"TEColumnParallelLinear"}, {"TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"}
    for name in (*LAYOUTS, *MORE):
        dense = fused
        built = set(engine[name]["layers"])
        if "adapters" in name:
            # Norms are apart from the linear layers.
            dense = {"TEColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"}
        expected = dense | (grouped if "grouped" in name else sequential if "experts" in name else set())
        if "latent" in name:
            # Down projections, and that of queries alone.
            assert "TELinear" in built
            built -= {"TELinear", "TEColumnParallelLinear"}
            expected = expected - {"TEColumnParallelLinear"}
        assert built == expected, name


@pytest.mark.parametrize("fault", FAULTS)
def test_a_layer_that_is_another_is_noticed(engine, local, fault):
    result, expected = engine[fault], local[FAULTS[fault]]
    if fault == "a norm has another name":
        (line,) = [line for line in result["printed"].splitlines() if "error" in line]
        assert "norm_weight" in line
        return
    with pytest.raises(AssertionError):
        assert_same_training(result, expected)
    # The output is right, the gradient is not.
    first, right = result["scalars"], expected["scalars"]
    assert first["lm loss"][0] == pytest.approx(right["lm loss"][0], rel=1e-6)
    assert first["grad-norm"][0] != pytest.approx(right["grad-norm"][0], rel=1e-4)


def test_no_other_process_sees_the_stand_in(engine):
    assert str(transformer_engine_runs.STAND_IN) not in sys.path
    found = importlib.util.find_spec("transformer_engine")
    assert found is None or str(transformer_engine_runs.STAND_IN) not in str(found.origin)
