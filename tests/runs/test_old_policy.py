"""psft, whose second model is the trained one of an earlier step: resumed, at layouts, with adapters and experts."""

import json

import pytest
from finetune_runs import TRAIN_ITERS, write_data, write_models
from layout_runs import DISTRIBUTED_OPTIMIZER, SEQUENCE_PARALLEL, assert_layouts, launch, pp, tensors, tp

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

SCALARS = ("lm loss", "label mass", "grad-norm", "p(y)")
# Renewed at steps 0, 3 and 6: the checkpoint of step 4 and of step 5 are between two.
STEPS, REFRESH, RATE = 7, 3, 0.02
PARAMETERS = ["--objective", "psft", "--objective-args", f"refresh={REFRESH}", "epsilon_high=0.1"]
VIRTUAL = [*pp(2), "--num-virtual-stages-per-pipeline-rank", 2]
LORA = ["--lora-rank", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("old-policy")
    write_models(folder)
    write_data(folder / "train.jsonl", 60, seed=1)
    return folder


@pytest.fixture(scope="module")
def words(workspace):
    def of(model, *more, rate=RATE):
        return [
            *("--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", *PARAMETERS),
            *("--train-iters", STEPS, "--lr", rate, "--min-lr", rate, *more),
        ]

    return of


def resumable(workspace, words, name, model, *more):
    """A training as a whole, ended after four steps, and gone on with."""
    save = ["--save-interval", 4, "--save"]

    def run(*flags, export):
        return [*words(model, *more), *flags, "--save-hf", workspace / f"hf-{export}"]

    return {
        f"{name}, whole": run(*save, workspace / f"{name}-whole", export=f"{name}-whole"),
        f"{name}, first": run("--exit-interval", 4, *save, workspace / name, export=f"{name}-first"),
        f"{name}, resumed": run("--load", workspace / name, *save, workspace / name, export=f"{name}-resumed"),
    }


def assert_resumed(workspace, found, name):
    for tag in SCALARS:
        whole, first, resumed = (found[f"{name}, {how}"]["scalars"][tag] for how in ("whole", "first", "resumed"))
        assert len(whole) == STEPS and first + resumed == whole, (name, tag, whole, first + resumed)
    masses = found[f"{name}, whole"]["scalars"]["label mass"]
    assert all(masses[step] == pytest.approx(1, abs=2e-2 if "bf16" in name else 1e-5) for step in (0, 3, 6)), masses
    assert all(abs(masses[step] - 1) > 1e-4 for step in (1, 2, 4, 5)), masses
    whole, resumed = (tensors(workspace / f"hf-{name}-{how}") for how in ("whole", "resumed"))
    assert whole and all((whole[key] == resumed[key]).all() for key in whole), name


def test_a_training_that_resumes_between_two_renewals_is_the_whole_one(workspace, words):
    runs = {
        **resumable(workspace, words, "untied", "untied"),
        **resumable(workspace, words, "adapters", "tied", *LORA),
        **resumable(workspace, words, "latent", "latent"),
        **resumable(workspace, words, "hybrid", "experts", "--model-class", "hybrid", "--bf16"),
    }
    found = launch(1, runs, workspace, 400)
    for name in ("untied", "adapters", "latent"):
        assert_resumed(workspace, found, name)
    for tag in SCALARS:
        whole, first, resumed = (found[f"hybrid, {how}"]["scalars"][tag] for how in ("whole", "first", "resumed"))
        assert first + resumed == whole, tag


def test_layouts_train_like_one_process(workspace, words):
    def of(model, *more):
        clipped = ["--objective-args", "refresh=2", "epsilon_high=0.02"]
        return [*words(model, *clipped, *more, rate=0.01), "--train-iters", TRAIN_ITERS]

    heads = ["--mtp-num-layers", 1]
    kinds = {
        "untied": of("untied"),
        "tied": of("tied"),
        "experts": of("experts"),
        "tied adapters": of("tied", "--lora-rank", 2),
        "untied packed": of("untied", "--pack"),
        "untied heads": of("untied", *heads, "--load", workspace / "heads", "--finetune"),
    }
    # Heads of multi-token prediction begin at random, which depends on the layout.
    start = ["--train-iters", 1, "--lr", 0, "--min-lr", 0, "--save", workspace / "heads", "--no-save-optim"]
    launch(1, {"start": [*words("untied", *heads), *start]}, workspace, timeout=200)
    single = launch(1, kinds, workspace, timeout=400)
    for kind, result in single.items():
        masses = result["scalars"]["label mass"]
        assert masses[::2] == pytest.approx([1, 1], abs=1e-5) and max(masses[1::2]) < 0.9, (kind, masses)
    # With adapters the old policy is a copy of these alone.
    costs = {kind: result["scalars"]["teacher MiB"] for kind, result in single.items()}
    assert max(costs["tied adapters"]) < 0.3 * min(costs["tied"]), costs
    overlap = [*DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 500]
    two = {
        "untied at DP2 with overlapped communication": [*kinds["untied"], *overlap],
        "tied at TP2 SP": [*kinds["tied"], *tp(2), *SEQUENCE_PARALLEL],
        "tied at PP2": [*kinds["tied"], *pp(2)],
        "untied at PP2 VPP2": [*kinds["untied"], *VIRTUAL],
        "experts at EP2": [*kinds["experts"], "--expert-model-parallel-size", 2, *DISTRIBUTED_OPTIMIZER],
        "experts at TP2 with recomputation": [
            *kinds["experts"],
            *tp(2),
            *SEQUENCE_PARALLEL,
            *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
        ],
        "tied adapters at PP2": [*kinds["tied adapters"], *pp(2)],
        "untied packed at CP2": [*kinds["untied packed"], "--context-parallel-size", 2],
        "untied heads at TP2": [*kinds["untied heads"], *tp(2)],
        "untied heads at PP2": [*kinds["untied heads"], *pp(2)],
    }
    assert_layouts(launch(2, two, workspace, 600), single)


def test_checkpoints_go_on_at_another_layout_and_with_another_objective(workspace, words):
    """From the checkpoint of one process, between two renewals."""
    save = ["--save", workspace / "moved", "--save-interval", 5]
    found = launch(1, {"first": [*words("tied", "--exit-interval", 5), *save], "whole": words("tied")}, workspace, 300)
    load = ["--load", workspace / "moved", "--no-load-rng"]
    sft = [word if word != "psft" else "sft" for word in words("tied") if "=" not in str(word)]
    sft.remove("--objective-args")
    resumed = launch(
        2,
        {
            "TP2": [*words("tied"), *load, *tp(2)],
            "PP2": [*words("tied"), *load, *pp(2)],
            "sft": [*sft, *load, "--save", workspace / "sft", "--save-interval", 1, "--exit-interval", 6],
            # Nobody has saved an old policy: it begins with the step.
            "psft": [*words("tied"), "--load", workspace / "sft"],
            "export": [*words("tied"), *load, "--skip-train", "--save-hf", workspace / "hf-moved"],
        },
        workspace,
        300,
    )
    for tag in SCALARS:
        whole = found["whole"]["scalars"][tag]
        assert found["first"]["scalars"][tag] == whole[:5]
        for layout in ("TP2", "PP2"):
            assert resumed[layout]["scalars"][tag] == pytest.approx(whole[5:], rel=1e-4), (layout, tag)
    assert resumed["psft"]["scalars"]["label mass"] == pytest.approx([1], abs=1e-5)
    assert abs(found["whole"]["scalars"]["label mass"][5] - 1) > 1e-4
    config = json.loads((workspace / "tied" / "config.json").read_text())
    assert len(tensors(workspace / "hf-moved")) == len(tensors(workspace / "tied")) and config
