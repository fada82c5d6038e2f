"""Fine-tuning a mixture of experts: spread over ranks, it trains as one process does."""

import pytest
import torch
from finetune_runs import COMMON, run_all, write_data, write_models
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
from noise_floor import MARGIN, WEIGHTS_FLOOR, update_difference

# The first test of a launch waits for all of its runs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(700)]


ALLTOALL = ["--moe-token-dispatcher-type", "alltoall"]
# At each: the parallel flags of a run that has to equal the single process's.
TWO = {
    "target-sft at EP2": ep(2),
    "target-sft at EP2 with the alltoall dispatcher and the distributed optimizer": [
        *ep(2),
        *ALLTOALL,
        *DISTRIBUTED_OPTIMIZER,
    ],
    "target-sft at TP2 with EP2": [*tp(2), *ep(2, 1), *SEQUENCE_PARALLEL],
    "latent at EP2": ep(2),
    "sinks at TP2 with EP2": [*tp(2), *ep(2, 1), *SEQUENCE_PARALLEL],
    "balanced at EP2": ep(2),
    "taught by experts at EP2": ep(2),
}
FOUR = {
    "target-sft at PP2 with EP2": [*pp(2), *ep(2)],
    "latent at PP2 with EP2": [*pp(2), *ep(2)],
    "sinks at TP2 with PP2": [*tp(2), *pp(2), *ep(1, 1), *SEQUENCE_PARALLEL, *DISTRIBUTED_OPTIMIZER],
    # The teacher's later stages get the whole padding mask, to cut it for their own experts.
    "taught by experts at TP2 with PP2": [*tp(2), *pp(2), *SEQUENCE_PARALLEL],
    "target-sft at TP2 with EP2, experts cut as well": [*tp(2), *ep(2), *SEQUENCE_PARALLEL, *DISTRIBUTED_OPTIMIZER],
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


@pytest.fixture(scope="module")
def kinds(workspace):
    words = ["--hf-model", workspace / "experts", "--sft-train", workspace / "train.jsonl"]
    words += ["--objective", "target-sft", "--objective-args", "eta=0.4"]
    taught = [*words, "--teacher-hf", workspace / "teacher"]
    return {
        "target-sft": taught,
        "latent": [word if word != workspace / "experts" else workspace / "latent" for word in taught],
        "sinks": [word if word != workspace / "experts" else workspace / "sinks" for word in taught],
        "balanced": [*taught, "--moe-aux-loss-coeff", 0.5],
        "taught by experts": [
            *(word if word != workspace / "experts" else workspace / "weighted" for word in words),
            *("--teacher-hf", workspace / "experts"),
        ],
    }


def with_layout(kinds, layouts):
    return {name: [*kinds[name.split(" at ")[0]], *words] for name, words in layouts.items()}


@pytest.fixture(scope="module")
def single(workspace, kinds):
    runs = {**kinds, "target-sft": [*kinds["target-sft"], "--save-hf", workspace / "single"]}
    runs["taught by experts"] = [*runs["taught by experts"], "--save-hf", workspace / "weighted-single"]
    runs["sinks"] = [*runs["sinks"], "--save-hf", workspace / "sinks-single"]
    runs["latent"] = [*runs["latent"], "--save-hf", workspace / "latent-single"]
    return launch(1, runs, workspace, timeout=240)


@pytest.fixture(scope="module")
def two(workspace, kinds):
    runs = with_layout(kinds, TWO)
    runs["latent at EP2"] += ["--save-hf", workspace / "latent-spread"]
    runs["taught by experts at EP2"] += ["--save-hf", workspace / "weighted-spread"]
    runs["sinks at TP2 with EP2"] += ["--save-hf", workspace / "sinks-spread"]
    runs["target-sft at EP2"] += ["--save-hf", workspace / "spread"]
    stop = ["--save", workspace / "saved", "--save-interval", 2, "--exit-interval", 2]
    runs["stopped at EP2"] = [*kinds["target-sft"], *ep(2), *DISTRIBUTED_OPTIMIZER, *stop]
    return launch(2, runs, workspace, timeout=300)


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_train_experts_like_one_process(two, single, name):
    assert_same_training(two[name], single[name.split(" at ")[0]])


def test_four_ranks_train_experts_like_one_process_and_resume_at_another_layout(workspace, kinds, two, single):
    runs = with_layout(kinds, FOUR)
    load = ["--load", workspace / "saved"]
    runs["resumed"] = [*kinds["target-sft"], *pp(2), *ep(2), *DISTRIBUTED_OPTIMIZER, *load]
    results = launch(4, runs, workspace, timeout=400)
    for name in FOUR:
        assert_same_training(results[name], single[name.split(" at ")[0]])
    assert_same_training(results["resumed"], single["target-sft"], first_step=2)


def test_every_expert_is_trained_and_exported(workspace, single, two):
    compare_exports(workspace / "spread", workspace / "single", workspace / "experts")
    experts = [name for name in tensors(workspace / "spread") if ".experts." in name]
    assert len(experts) == 3 * 4 * 3  # layers, experts, matrices


def test_a_shared_expert_and_its_weight_are_trained_and_exported(workspace, single, two):
    compare_exports(workspace / "weighted-spread", workspace / "weighted-single", workspace / "weighted")
    assert sum(".shared_expert_gate." in name for name in tensors(workspace / "weighted-spread")) == 3


def test_sinks_and_biases_are_trained_and_exported(workspace, single, two):
    compare_exports(workspace / "sinks-spread", workspace / "sinks-single", workspace / "sinks")
    names = {name.rpartition(".")[2] for name in tensors(workspace / "sinks-spread")}
    assert {"sinks", "gate_up_proj_bias", "down_proj_bias", "bias"} <= names


def test_the_correction_of_the_routers_scores_is_not_trained(workspace, single, two):
    before, after = tensors(workspace / "latent"), tensors(workspace / "latent-spread")
    (name,) = [name for name in before if name.endswith("e_score_correction_bias")]
    assert torch.equal(before[name], after[name]) and before[name].count_nonzero() == 8
    expected = tensors(workspace / "latent-single")
    assert update_difference(after, expected, before) <= MARGIN * WEIGHTS_FLOOR
    for key, tensor in expected.items():
        assert key == name or not torch.equal(tensor, before[key]), f"{key} was not trained"


def test_balance_is_only_trained_on_request(single):
    plain, balanced = single["target-sft"]["scalars"], single["balanced"]["scalars"]
    assert balanced["lm loss"][0] == plain["lm loss"][0]
    assert balanced["grad-norm"][0] != pytest.approx(plain["grad-norm"][0], rel=1e-4)


def test_what_experts_cannot_do_is_refused_before_anything_is_built(workspace, two):
    base = ["--hf-model", workspace / "experts", "--sft-train", workspace / "train.jsonl", *COMMON]
    cases = {
        "3 ranks": (ep(3), "--expert-model-parallel-size 3 does not divide the 4 experts of the student"),
        "3 parts": (ep(1, 3), "does not divide the expert width 20 of the student"),
        "too few": (ep(2), "expected a multiple of 2 processes"),
        "a flag": (["--num-experts", 8], "--num-experts follow(s) from the model's config.json"),
        "a router": (["--moe-router-pre-softmax"], "--moe-router-pre-softmax follow(s) from"),
        "scales": (["--use-mup"], "--use-mup follow(s) from"),
        "heads": (["--mtp-num-layers", 0], "--mtp-num-layers: expected 1 or more, got 0"),
        "saved heads": (
            ["--load", workspace / "saved", "--no-load-optim", "--mtp-num-layers", 1],
            "was saved with --mtp-num-layers None, got 1",
        ),
        "sinkhorn": (["--moe-router-load-balancing-type", "sinkhorn"], "sinkhorn would balance padding as well"),
        "quantiles": (
            ["--moe-router-load-balancing-type", "aux_loss", "quantile_balancing", "--moe-aux-loss-coeff", 0.1, 0],
            "quantile_balancing would balance padding as well",
        ),
        "room": (
            ["--moe-expert-capacity-factor", 1.0, "--moe-pad-expert-input-to-capacity", *ALLTOALL],
            "--moe-pad-expert-input-to-capacity would give padding room of the experts",
        ),
        "count": (
            ["--objective", "profit", "--objective-args", "denominator=kept", "--moe-z-loss-coeff", 0.1],
            "divides by a number of tokens that is known after all losses",
        ),
        "tokens": ([*tp(2), *ep(1, 1)], "give --sequence-parallel with --tensor-model-parallel-size 2"),
        "latent": (
            ["--hf-model", workspace / "latent", *tp(2), *ep(1, 1), *SEQUENCE_PARALLEL],
            "wrong gradients under tensor parallelism",
        ),
        # The optimizer's states of spread experts; the weights alone load.
        "resumed": (["--load", workspace / "saved"], "was saved with --expert-model-parallel-size 2"),
    }
    runs = {name: [str(word) for word in [*base, *words]] for name, (words, _) in cases.items()}
    (results,) = run_ranks(1, run_all, (runs, str(workspace), []), timeout=200, megatron=True)
    for name, (_, message) in cases.items():
        assert results[name]["code"] == 2, (name, results[name]["printed"][-2000:])
        (line,) = [line for line in results[name]["printed"].splitlines() if "error:" in line]
        assert line.startswith("finetune: error: ") and message in line, (name, line)
