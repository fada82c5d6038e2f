"""Fine-tuning with multi-token prediction: the heads' losses at every layout, checkpoints, export, and refusals."""

import pytest
from finetune_runs import write_data, write_models
from layout_runs import DISTRIBUTED_OPTIMIZER, SEQUENCE_PARALLEL, compare_exports, launch, pp, tp
from noise_floor import TAGS, bound

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 3
HEADS = ["--mtp-num-layers", 2, "--mtp-loss-scaling-factor", 0.5]
PACKED = ["--pack", "--seq-length", 64, "--global-batch-size", 4]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mtp")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


@pytest.fixture(scope="module")
def models(workspace):
    """The flags of each kind of run; all of a student start from the same random heads, see single."""

    def words(student, objective, *more):
        data = ["--hf-model", workspace / student, "--sft-train", workspace / "train.jsonl", "--train-iters", STEPS]
        start = ["--load", workspace / f"{student}-start", "--finetune"]
        return [*data, *start, *HEADS, "--objective", objective, *more]

    taught = ["--objective-args", "eta=0.4", "--teacher-hf", workspace / "teacher"]
    balance = ["--moe-aux-loss-coeff", 0.1, "--moe-z-loss-coeff", 0.1]
    return {
        "untied": words("untied", "target-sft", *taught),
        "untied, packed": words("untied", "target-sft", *taught, *PACKED),
        "tied": words("tied", "weighted-sft"),
        "tied, packed": words("tied", "weighted-sft", *PACKED),
        "experts": words("experts", "sft", *balance),
    }


@pytest.fixture(scope="module")
def single(workspace, models):
    """One process, which draws the heads first."""
    runs = {}
    for student in ("untied", "tied", "experts"):
        data = ["--hf-model", workspace / student, "--sft-train", workspace / "train.jsonl", *HEADS]
        runs[f"{student} start"] = [*data, "--objective", "sft", "--train-iters", 1, "--lr", 0, "--min-lr", 0]
        runs[f"{student} start"] += ["--save", workspace / f"{student}-start", "--no-save-optim"]
    runs |= {name: [*words, "--save-hf", workspace / f"{name} trained"] for name, words in models.items()}
    runs["tied"] += ["--save", workspace / "saved", "--save-interval", 2, *DISTRIBUTED_OPTIMIZER]
    return launch(1, runs, workspace, timeout=240)


def assert_same(result, expected, first_step=0, steps=STEPS, gradients=True):
    heads = [f"mtp {head} {name}" for head in (1, 2) for name in ("loss", "trust", "p(y)", "entropy")]
    means = TAGS if gradients else [tag for tag in TAGS if tag != "grad-norm"]
    for tag in (*means, *heads, "mtp_1_acceptance_rate", "mtp_2_acceptance_rate"):
        got, want = result["scalars"][tag], expected["scalars"][tag][first_step:]
        assert len(got) == STEPS - first_step, tag
        for step, (a, b) in enumerate(zip(got[:steps], want[:steps], strict=True), first_step + 1):
            kind = "lm loss" if tag.startswith("mtp") else tag
            assert a == pytest.approx(b, rel=bound(kind, step), abs=1e-9), (tag, step)


def test_heads_are_told_apart_from_the_next_token(single):
    for name, result in single.items():
        values = [tuple(result["scalars"][tag]) for tag in ("lm loss", "mtp 1 loss", "mtp 2 loss")]
        assert len(set(values)) == 3, name
    assert "start from random weights" in single["tied start"]["printed"]
    assert "without the heads of --mtp-num-layers" in single["tied"]["printed"]


def test_two_ranks_train_heads_like_one_process(workspace, models, single):
    runs = {
        "untied at TP2 with sequence parallelism": [*models["untied"], *tp(2), *SEQUENCE_PARALLEL],
        "untied, packed at TP2 with sequence parallelism": [*models["untied, packed"], *tp(2), *SEQUENCE_PARALLEL],
        "untied at PP2, two stages on each": [*models["untied"], *pp(2), "--num-virtual-stages-per-pipeline-rank", 2],
        "tied at TP2 with whole logits": [*models["tied"], *tp(2), "--qtarget-materialize-logits"],
        "tied, packed at PP2": [*models["tied, packed"], *pp(2), "--save-hf", workspace / "staged"],
        "tied at DP2": [*models["tied"], *DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"],
        "experts at TP2 with sequence parallelism": [*models["experts"], *tp(2), *SEQUENCE_PARALLEL],
        "experts at EP2": [*models["experts"], "--expert-model-parallel-size", 2],
        "untied, packed at CP2": [*models["untied, packed"], "--context-parallel-size", 2],
        "untied at CP2": [*models["untied"], "--context-parallel-size", 2],
        "tied resumed at PP2": [
            *(word for word in models["tied"] if word != "--finetune"),
            *(*pp(2), *DISTRIBUTED_OPTIMIZER, "--load", workspace / "saved", "--ckpt-step", 2),
        ],
    }
    results = launch(2, runs, workspace, timeout=300)
    for name, result in results.items():
        first, expected = 2 if "resumed" in name else 0, single[name.split(" at ")[0].split(" resumed")[0]]
        # Megatron divides the losses of heads by the tokens of each rank of context parallelism, not by those of all.
        cut = dict(steps=1, gradients=False) if "CP2" in name else {}
        try:
            assert_same(result, expected, first, **cut)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error
    compare_exports(workspace / "staged", workspace / "tied, packed trained", workspace / "tied")
