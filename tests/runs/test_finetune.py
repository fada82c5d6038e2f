"""Fine-tuning at parallel layouts: every layout trains the same model as one process does."""

import json

import pytest
import torch
from finetune_runs import TRAIN_ITERS, write_data, write_models
from launching import REPOSITORY
from layout_runs import (
    ARGUMENTS,
    DISTRIBUTED_OPTIMIZER,
    SEQUENCE_PARALLEL,
    assert_layouts,
    assert_same_training,
    compare_exports,
    launch,
    pp,
    tensors,
    tp,
)
from noise_floor import MARGIN, WEIGHTS_FLOOR, bound, update_difference

from qtarget_megatron import objectives

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    write_data(folder / "valid.jsonl", 8, seed=2)
    return folder


@pytest.fixture(scope="module")
def models(workspace):
    """The flags of each kind of run: which student, objective and teacher."""
    data = ["--sft-train", workspace / "train.jsonl", "--micro-batch-size", 2]
    untied, tied = (["--hf-model", workspace / name, *data] for name in ("untied", "tied"))
    teacher = ["--teacher-hf", workspace / "teacher"]
    runs = {}
    for name, words in ARGUMENTS.items():
        flags = ["--objective", name, "--objective-args", *words] if words else ["--objective", name]
        if objectives.from_arguments(name, words).needs_teacher:
            flags += teacher
        runs[f"untied {name}"] = [*untied, *flags]
        if name in ("target-sft", "label-smoothing", "kd"):
            runs[f"tied {name}"] = [*tied, *flags]
    own = ["--objective-file", readme_objective(workspace), "--objective", "cautious", *teacher]
    runs["untied readme"] = [*untied, *own]
    return runs


def readme_objective(workspace):
    """The README's example of an objective of one's own, as a file."""
    blocks = (REPOSITORY / "README.md").read_text().split("```python\n")[1:]
    (code,) = (block.split("```")[0] for block in blocks if "@objectives.register" in block)
    path = workspace / "my_objectives.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def single(workspace, models):
    """One process: what every layout has to reproduce."""
    runs = dict(models)
    export = [
        "--sft-valid",
        workspace / "valid.jsonl",
        "--eval-iters",
        1,
        "--save-hf",
        workspace / "single-hf",
    ]
    runs["untied target-sft"] = [*runs["untied target-sft"], *export]
    half = ["--save-hf", workspace / "half", "--save-hf-dtype", "bfloat16"]
    runs["untied sft"] = [*runs["untied sft"], *half]
    return launch(1, runs, workspace, timeout=240)


def test_the_export_has_the_dtype_that_was_asked_for(single, workspace):
    assert {tensor.dtype for tensor in tensors(workspace / "half").values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors(workspace / "single-hf").values()} == {torch.float32}
    assert json.loads((workspace / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_one_process_trains(single):
    assert single["untied sft"]["scalars"]["lm loss"][-1] < single["untied sft"]["scalars"]["lm loss"][0]
    trust = single["untied target-sft"]["scalars"]["trust"]
    assert trust == pytest.approx(single["untied target-sft"]["scalars"]["p(y)"])
    assert all(0 < value < 1 for value in trust)


def test_every_objective_is_trained_here():
    assert set(ARGUMENTS) == set(objectives.names())


def test_masks_and_clips_split_the_tokens(single):
    for name in ("profit", "cft", "entropy-mask", "psft"):
        mass = single[f"untied {name}"]["scalars"]["label mass"][0]
        assert 0.05 < mass < 0.95, (name, mass)


def test_total_mass_is_the_scale_of_the_objective(single):
    for name, expected in {"sft": 1, "target-sft": 1, "sft-kl": 1.3, "gem": 0, "kd": 0, "hybrid-kd": 1}.items():
        assert single[f"untied {name}"]["scalars"]["total mass"] == pytest.approx([expected] * TRAIN_ITERS, abs=1e-6)


# What differs in more than its formula: teachers, kinds of side inputs, denominators, largest logits, an own objective.
# Trained at TP2PP2; the other objectives at TP2.
STAGED = [f"untied {name}" for name in ("target-sft", "kd", "asft", "weighted-sft", "cft", "psft", "eaft", "readme")]
STAGED += ["tied target-sft", "tied kd", "tied label-smoothing"]


def test_two_ranks_train_like_one_process(workspace, models, single):
    runs = {
        "untied target-sft at TP2": [*models["untied target-sft"], *tp(2)],
        "untied target-sft at PP2": [*models["untied target-sft"], *pp(2)],
        "tied target-sft at TP2 with sequence parallelism": [
            *models["tied target-sft"],
            *tp(2),
            *SEQUENCE_PARALLEL,
        ],
        "tied target-sft at PP2": [*models["tied target-sft"], *pp(2)],
        "untied sft at DP2": models["untied sft"],
        "tied label-smoothing at DP2 with the distributed optimizer": [
            *models["tied label-smoothing"],
            *DISTRIBUTED_OPTIMIZER,
        ],
        **{
            f"{kind} target-sft at DP2 with overlapped communication": [
                *models[f"{kind} target-sft"],
                *DISTRIBUTED_OPTIMIZER,
                *("--overlap-grad-reduce", "--overlap-param-gather"),
                # A bucket for nearly every parameter: whoever uses one without its module's hooks meets old values.
                *("--ddp-bucket-size", 500),
            ]
            for kind in ("tied", "untied")
        },
        **{
            f"{kind} target-sft at TP2 with whole logits{' and sequence parallelism' if flags else ''}": [
                *models[f"{kind} target-sft"],
                *tp(2),
                *flags,
                "--qtarget-materialize-logits",
            ]
            for kind, flags in (("tied", []), ("untied", SEQUENCE_PARALLEL))
        },
        "untied psft at TP2 in chunks of 3 tokens": [*models["untied psft"], *tp(2), "--qtarget-chunk-size", 3],
        **{f"{kind} at TP2": [*words, *tp(2)] for kind, words in models.items() if kind not in STAGED},
    }
    assert_layouts(launch(2, runs, workspace, timeout=300), single)


# A weight that depends on its sample, a denominator of its own, a teacher with M != 1, and a ratio.
UNEVEN = ("weighted-sft", "cft", "asft", "psft")


def test_gradient_accumulation_and_data_parallelism_give_the_same_update(workspace, models, single):
    """4, 2 and 1 micro-batches of a global batch of 8, on one rank and on two."""
    alone = {f"untied {name} at {size} a micro-batch": size for name in UNEVEN for size in (4, 8)}
    shared = {f"untied {name} at DP2, {size} a micro-batch": size for name in UNEVEN for size in (1, 4)}

    def runs(sizes):
        return {
            name: [*models[name.split(" at ")[0]], "--micro-batch-size", size, "--save-hf", workspace / name]
            for name, size in sizes.items()
        }

    assert_layouts(launch(1, runs(alone), workspace, timeout=240), single)
    assert_layouts(launch(2, runs(shared), workspace, timeout=240), single)
    before = tensors(workspace / "untied")
    for name in UNEVEN:
        sizes = [*alone, *shared]
        first, *others = [tensors(workspace / run) for run in sizes if run.startswith(f"untied {name} ")]
        assert len(others) == 3
        for other in others:
            assert update_difference(other, first, before) <= MARGIN * WEIGHTS_FLOOR


def test_four_ranks_train_every_kind_of_objective_like_one_process(workspace, models, single):
    layout = [*tp(2), *pp(2)]
    runs = {f"{kind} at TP2PP2": [*models[kind], *layout] for kind in STAGED}
    export = [
        "--sft-valid",
        workspace / "valid.jsonl",
        "--eval-iters",
        1,
        "--save-hf",
        workspace / "sharded-hf",
    ]
    runs["untied target-sft at TP2PP2"] += export
    runs["untied target-sft at TP4"] = [*models["untied target-sft"], *tp(4)]
    runs["tied kd at TP4, more ranks than key/value heads"] = [*models["tied kd"], *tp(4)]
    results = launch(4, runs, workspace, timeout=400)
    assert_layouts(results, single)

    tag = "lm loss validation"
    held_out, expected = (
        results["untied target-sft at TP2PP2"]["scalars"][tag],
        single["untied target-sft"]["scalars"],
    )
    assert held_out == pytest.approx(expected[tag], rel=bound("lm loss", TRAIN_ITERS))
    compare_exports(workspace / "sharded-hf", workspace / "single-hf", workspace / "untied")


def test_eight_ranks_train_like_one_process_and_resume_at_other_layouts(workspace, models, single):
    target, tied = models["untied target-sft"], models["tied target-sft"]
    layout = [*tp(2), *pp(2), *SEQUENCE_PARALLEL, *DISTRIBUTED_OPTIMIZER]
    stop = ["--save-interval", 2, "--exit-interval", 2]
    save, resume = workspace / "saved", workspace / "saved-tied"
    eight = {
        "untied target-sft at TP2PP2DP2": [*target, *layout],
        "tied target-sft at TP2PP2DP2": [*tied, *layout],
        "untied stopped": [*target, *layout, "--save", save, *stop],
    }
    results = launch(8, eight, workspace, timeout=500)
    assert_layouts({name: result for name, result in results.items() if " at " in name}, single)
    four = {
        "untied resumed at DP4": [*target, *DISTRIBUTED_OPTIMIZER, "--load", save],
        "untied resumed at TP2DP2": [*target, *tp(2), "--use-distributed-optimizer", "--load", save],
        "tied stopped": [*tied, *tp(2), *DISTRIBUTED_OPTIMIZER, "--save", resume, *stop],
        "tied resumed at PP2DP2": [*tied, *pp(2), *DISTRIBUTED_OPTIMIZER, "--load", resume],
    }
    for name, result in launch(4, four, workspace, timeout=300).items():
        if "resumed" in name:
            kind = f"{name.split()[0]} target-sft"
            try:
                assert_same_training(result, single[kind], first_step=2)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error
