"""--model-class: a HybridModel goes on with what a GPTModel has saved, and the other way round."""

import pytest
from checkpoint_models import assert_same_bits
from conversion_runs import TOLERANCE, only, read_tensors, run_all, transformers_logits
from finetune_runs import run_all as train_all
from finetune_runs import write_data, write_models
from launching import run_ranks
from layout_runs import ep, pp, tp

from tools.first_hour.families import write_model

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

GPT, HYBRID = ["--model-class", "gpt"], ["--model-class", "hybrid"]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]
PADDING = ["--make-vocab-size-divisible-by", 1]
WITH_EXPERTS = ["qwen2_moe", "gpt_oss", "qwen3_moe", "deepseek_v3"]
FAMILIES = ["llama3-tied", *WITH_EXPERTS]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classes")
    for name in FAMILIES:
        write_model(folder / name, name.partition("-")[0], tied=name.endswith("-tied"))
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def convert(size, jobs, timeout=420):
    """Results of every rank, by job."""
    jobs = {name: tuple(map(str, job)) for name, job in jobs.items()}
    results = run_ranks(size, run_all, (jobs,), timeout, megatron=True)
    return {name: [result[name] for result in results] for name in jobs}


def test_stages_that_a_layout_states_are_those_of_a_gpt_model(workspace):
    """One without layers among them."""
    layout = [*pp(4), "--pipeline-model-parallel-layout", "Et|ttt||L"]
    names = ("llama3-tied", "deepseek_v3")
    found = convert(4, {name: ("logits", workspace / name, *PADDING, *HYBRID, *layout) for name in names})
    for name in names:
        expected = transformers_logits(workspace / name)
        assert (only(found[name]) - expected).abs().max() <= TOLERANCE < expected.abs().max(), name


# ---- checkpoints of one class in the other

DISTRIBUTED = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
STOP = ["--save-interval", 2, "--exit-interval", 2]
# Student, flags of both trainings, and the layout of the first.
KINDS = {
    "tied": ("tied", [], pp(2)),
    "bf16": ("untied", ["--bf16"], tp(2)),
    "distributed": ("untied", [*DISTRIBUTED, "--bf16"], [*pp(2), *VPP2]),
    # Some layers have experts, others not: their tensors are named one by one.
    "experts": ("experts", [*DISTRIBUTED, *ep(2)], []),
    "latent": ("latent", [], pp(2)),
    # Its states are those of gradient buckets, which load at their own layout.
    "buckets": ("untied", ["--use-distributed-optimizer"], []),
}


def test_a_training_goes_on_in_the_other_class(workspace, tmp_path):
    """With the optimizer's state, at another layout, as it would have gone on in its own."""
    runs, names = {}, []
    for name, (model, flags, first) in KINDS.items():
        shared = ["--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", *flags]
        for one, other in ((GPT, HYBRID), (HYBRID, GPT)):
            key, save = f"{name} of {one[1]}", tmp_path / f"{name}-{one[1]}"
            runs[key] = [*shared, *one, *first, "--save", save, *STOP]
            for kind in (one, other):
                names.append((f"{key} in {kind[1]}", key))
                runs[names[-1][0]] = [*shared, *kind, "--load", save]
    runs = {name: [str(word) for word in words] for name, words in runs.items()}
    first, results = run_ranks(2, train_all, (runs, str(workspace)), 600, megatron=True)
    for name, before in names:
        assert results[name]["code"] == 0, first[name]["printed"][-3000:]
        assert "the state that was loaded is what was saved, bit for bit" in first[name]["printed"], name
        assert len(results[before]["scalars"]["lm loss"]) == 2
        own = f"{before} in {before.split()[-1]}"
        for tag, bound in (("lm loss", 1e-6), ("grad-norm", 1e-5)):
            # float32 sums in another order; bfloat16 rounds the same way, as the order is the same.
            assert results[name]["scalars"][tag] == pytest.approx(results[own]["scalars"][tag], rel=bound), (name, tag)


def test_what_one_class_imports_the_other_exports(workspace, tmp_path):
    jobs = {}
    for name in ("llama3-tied", *WITH_EXPERTS):
        source = ["--hf-model", workspace / name]
        for one, other in ((GPT, HYBRID), (HYBRID, GPT)):
            ckpt, out = tmp_path / f"{name}-{one[1]}", tmp_path / f"{name}-by-{other[1]}"
            jobs[f"import {name} {one[1]}"] = ("convert", "import", *source, "--save", ckpt, *one, *pp(2))
            jobs[f"export {name} {other[1]}"] = (
                *("convert", "export", *source, "--load", ckpt, "--save-hf", out, *other, *pp(2), *VPP2),
            )
    for key, outcomes in convert(2, jobs).items():
        assert {code for code, _ in outcomes} == {0}, (key, outcomes)
    for name in ("llama3-tied", *WITH_EXPERTS):
        for kind in ("gpt", "hybrid"):
            assert_same_bits(read_tensors(tmp_path / f"{name}-by-{kind}"), read_tensors(workspace / name))
