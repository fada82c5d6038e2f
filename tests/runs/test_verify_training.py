"""qtarget verify --train: sound layouts pass, planted faults are found and named, and nothing is left behind."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
from launching import run_alone, run_ranks
from megatron_reset import reset

from qtarget_megatron.commands import verify_parallel
from qtarget_megatron.megatron.faults.explained import Fault
from qtarget_megatron.megatron.verify import one_rank
from qtarget_megatron.megatron.verify.one_rank import Job, OneRank

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(400)]

# A Qwen3-MoE of few experts, whose output head is the embedding.
CONFIG = dict(
    architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=151_936, hidden_size=2048,
    intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=768, norm_topk_prob=True, mlp_only_layers=[],
    max_position_embeddings=40_960, rms_norm_eps=1e-6, rope_theta=1e6, tie_word_embeddings=True, torch_dtype="bfloat16",
)  # fmt: skip
TP2, PP2, PP4, CP2, EP2 = (
    [f"--{name}-parallel-size", size]
    for name, size in (
        ("tensor-model", "2"),
        ("pipeline-model", "2"),
        ("pipeline-model", "4"),
        ("context", "2"),
        ("expert-model", "2"),
    )
)
VP2 = ["--num-virtual-stages-per-pipeline-rank", "2"]
# Of a training that is to be verified, and of no matter here.
TRAINING = ["--seq-length", "4096", "--lr", "1e-5", "--epochs", "3", "--save", "CKPT", "--sft-train", "no-such-file"]


# ---- what is planted, in the ranks


@contextlib.contextmanager
def packing_bounds_lost_in_the_middle():
    """A stage that is neither the first nor the last one takes a row for one sample."""
    from qtarget_megatron.megatron.model.stacked_teacher import StackedModel

    forward = StackedModel.forward

    def lost(model, *arguments, packed_seq_params=None, **keywords):
        if not (model.pre_process or model.post_process):
            packed_seq_params = None
        return forward(model, *arguments, packed_seq_params=packed_seq_params, **keywords)

    with mock.patch.object(StackedModel, "forward", lost):
        yield


@contextlib.contextmanager
def experts_scaled_by_another_group():
    """Gradients of experts are divided once more, by the ranks that share them."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel

    scale = DistributedDataParallel.scale_gradients

    def twice(model, factor):
        scale(model, factor)
        for buffer in model.expert_parallel_buffers:
            buffer.scale_gradients(1 / parallel_state.get_expert_model_parallel_world_size())

    with mock.patch.object(DistributedDataParallel, "scale_gradients", twice):
        yield


def tied_embedding_not_summed():
    """The first stage has the gradient of the embedding, the last one that of the head."""
    module = sys.modules["megatron.core.distributed.finalize_model_grads"]
    return mock.patch.object(module, "_allreduce_word_embedding_grads", lambda *arguments, **keywords: None)


@contextlib.contextmanager
def loss_divided_per_rank():
    """Each rank divides by the tokens of its own micro-batch; the report stays as it is."""
    from qtarget_megatron.megatron.training import step

    sum_loss = step.sum_loss

    def mean(*arguments, **keywords):
        total, tokens, report = sum_loss(*arguments, **keywords)
        return total / tokens.clamp(min=1), tokens.clamp(max=1), report

    with mock.patch.object(step, "sum_loss", mean):
        yield


# Ranks; words.
SOUND = {
    "TP2 x PP2, bf16": (4, [*TP2, *PP2, "--sequence-parallel", "--bf16", *TRAINING]),
    "EP2": (2, [*EP2, "--use-distributed-optimizer"]),
    "CP2, bf16": (2, [*CP2, "--bf16"]),
    "PP2 x VP2": (2, [*PP2, *VP2]),
}
# Ranks; words; what is broken; the first parameter that differs.
FAULTY = {
    "bounds": (4, PP4, packing_bounds_lost_in_the_middle, "model.embed_tokens.weight"),
    "experts": (2, EP2, experts_scaled_by_another_group, "model.layers.0.mlp.experts.0.gate_proj.weight"),
    "tied": (2, PP2, tied_embedding_not_summed, "model.embed_tokens.weight"),
    "mean": (2, [], loss_divided_per_rank, "model.embed_tokens.weight"),
}


def run_cases(cases: dict[str, tuple], own: list[str], model: str) -> dict[str, tuple[int, str, str]]:
    """Exit code and both outputs on this rank of verify with own flags, by case (words, what is broken)."""
    found = {}
    for name, (words, broken) in cases.items():
        out, errors = io.StringIO(), io.StringIO()
        with broken(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = verify_parallel.main([*own, "--train", "--hf-model", model, *words])
        found[name] = code, out.getvalue(), errors.getvalue()
        reset()
    return found


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """DIR with nothing but a config.json, and the folder that results of one rank are kept in."""
    folder = tmp_path_factory.mktemp("verify")
    (folder / "DIR").mkdir()
    (folder / "DIR/config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope="module")
def outcomes(workspace):
    """Of each rank, by case."""
    found = {}
    for size in (4, 2):
        cases = {name: (words, contextlib.nullcontext) for name, (ranks, words) in SOUND.items() if ranks == size}
        faulty = {name: case[1:3] for name, case in FAULTY.items() if case[0] == size}
        cases |= {name: ([*words, "--bf16"], broken) for name, (words, broken) in faulty.items()}
        own = ["--keep", str(workspace / "keep")]
        of_ranks = run_ranks(size, run_cases, (cases, own, str(workspace / "DIR")), 100, megatron=True)
        found |= {name: [outcome[name] for outcome in of_ranks] for name in cases}
    return found


FIRST = re.compile(
    r"FAIL: (\S+) is the first parameter, in the model's order, whose (.*) differs: off by (\S+) of its size "
    r"\(bound (\S+)\) on rank \d+, (\S+) times the reference's along it"
)


# ---- the tests


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_layout_passes(outcomes, name):
    for rank, (code, text, errors) in enumerate(outcomes[name]):
        assert code == 0, f"rank {rank}:\n{text}{errors}"
        assert rank == 0 or text == ""
    text = outcomes[name][0][1]
    assert "verified: " in text and "FAIL" not in text
    # What one rank computed for the first is enough for all others.
    assert ("known from an earlier" in text) == (name != next(iter(SOUND)))
    assert ("\nleft out   --save\n" in text) == ("--save" in SOUND[name][1])


@pytest.mark.parametrize("name", FAULTY)
def test_a_planted_fault_is_found_and_named(outcomes, name):
    assert [code for code, _, _ in outcomes[name]] == [1] * FAULTY[name][0], outcomes[name][0][1]
    text = outcomes[name][0][1]
    assert "known from an earlier" in text and "\nNOT verified: " in text
    parameter, kind, off, bound, ratio = FIRST.search(text).groups()
    assert (kind, parameter) == ("gradient of step 1", FAULTY[name][3])
    # By far: in bfloat16 too it is no matter of luck.
    assert float(off) > 4 * float(bound)
    hint = "look at the forward pass" if name == "bounds" else "the loss of step 1 is right: look at the backward pass"
    assert hint in text
    table = text[text.index("\ngradient of step 1\n") : text.index("\ngradient of step 2\n")]
    wrong = [line for line in table.splitlines() if "FAIL" in line]
    if name == "experts":
        assert float(ratio) == pytest.approx(0.5, abs=0.02)
        assert len(wrong) == 4 and all("mlp.experts." in line for line in wrong)
    if name == "tied":
        assert len(wrong) == 1 and wrong[0].startswith("model.embed_tokens ")


# ---- one rank


def lost_module():
    return mock.patch.object(one_rank, "MODULE", "no_such_module")


REFUSED = {
    "nothing to train": (["--skip-train"], "--skip-train: nothing would be trained: drop it"),
    "heads": (["--mtp-num-layers", "1"], "--mtp-num-layers: heads are not compared: drop it"),
    "a cache": (["--teacher-cache", "DIR"], "--teacher-cache: a cache belongs to its data: give --teacher-hf DIR"),
    "ranks": (TP2, "tensor 2 x pipeline 1 x context 1 takes a multiple of 2 ranks, got 1"),
    # What divides the small model need not divide theirs.
    "experts": ([EP2[0], "3"], "--expert-model-parallel-size 3 does not divide the 4 experts of the student"),
    "chunks": ([*VP2[:1], "5"], "5 at 1 pipeline ranks does not divide the 48 layers of the student"),
}
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"]


@pytest.fixture(scope="module")
def alone(workspace, outcomes):
    """Of one rank, by case; after four ranks have computed what is kept."""
    cases = {name: (words, contextlib.nullcontext) for name, (words, _) in REFUSED.items()}
    cases["recomputed"] = ["--bf16", *FULL], contextlib.nullcontext
    # Another seed is not known yet.
    cases["lost"] = (["--seed", "5"], lost_module)
    own = ["--keep", str(workspace / "keep"), "--timeout", "300"]
    return run_ranks(1, run_cases, (cases, own, str(workspace / "DIR")), 60, megatron=True)[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_verified_is_one_line(alone, name):
    code, text, errors = alone[name]
    assert code == 2, text + errors
    (line,) = [line for line in errors.splitlines() if "error" in line]
    assert line.startswith("verify: error: ") and REFUSED[name][1] in line


def test_one_rank_verifies_what_is_not_its_layout(alone):
    code, text, errors = alone["recomputed"]
    assert code == 0, text + errors
    assert "verified: one rank trains as one rank does" in text


def test_what_fails_on_one_rank_is_shown(alone):
    code, text, errors = alone["lost"]
    assert code == 1, text + errors
    assert "No module named no_such_module" in errors
    assert "verify: error on rank 0: training on one rank has failed with exit code 1: its log is above" in errors


# ---- its processes


@pytest.fixture
def sleeper(tmp_path, monkeypatch):
    """In place of the module that trains: it writes its number and sleeps."""
    (tmp_path / "sleeper.py").write_text(
        "import os, pathlib, sys, time\n"
        "pathlib.Path(sys.argv[1]).with_suffix('.number').write_text(str(os.getpid()))\ntime.sleep(1000)\n"
    )
    monkeypatch.setattr(one_rank, "MODULE", "sleeper")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Job(os.getpid(), str(tmp_path), {"reference": []}, None, True)


def test_a_training_that_takes_too_long_is_ended(sleeper, tmp_path, capsys):
    with OneRank(tmp_path, [sleeper], timeout=1) as alone:
        with pytest.raises(Fault, match=r"training on one rank has not ended within 1 s \(--timeout\)"):
            alone.results()
    assert str(tmp_path / "one-rank.log") in capsys.readouterr().err
    assert_gone(tmp_path / "reference.number")


def test_no_training_outlives_what_waits_for_it(sleeper, tmp_path):
    number = tmp_path / "reference.number"
    with pytest.raises(ZeroDivisionError), OneRank(tmp_path, [sleeper], timeout=1000):
        while not number.exists() or not number.read_text():
            time.sleep(0.01)
        raise ZeroDivisionError
    assert_gone(number)


def assert_gone(number: Path) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


def test_a_training_ends_with_the_process_that_has_started_it(tmp_path):
    """Also where that was gone before it could look."""
    (gone := subprocess.Popen([sys.executable, "-c", ""])).wait()
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)\n")
    job = Job(gone.pid, str(tmp_path), {}, str(tmp_path / "slow.py"), True)
    (tmp_path / "job.json").write_text(json.dumps(dataclasses.asdict(job)))
    done = run_alone([one_rank.MODULE, tmp_path / "job.json"], timeout=200, folder=tmp_path)
    assert done.returncode == 1, done.stdout
