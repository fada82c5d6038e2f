"""The command verify_parallel: passes at sound layouts, and finds what is broken on any rank, without hanging."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from launching import REPOSITORY, run_ranks, run_torchrun

from qtarget_megatron import collectives, objectives
from qtarget_megatron.commands import verify_parallel
from qtarget_megatron.megatron.verify import problem
from qtarget_megatron.megatron.verify.problem import (
    LOSS_BOUND,
    Problem,
    Setting,
    chosen_objectives,
    gradient_bound,
    measure,
)

SMALL = ["--vocab-size", "500", "--tokens", "40", "--hidden", "32"]
FEW = ["--objective", "sft", "eaft", "target-sft", "kd:temperature=2"]
TP2, TP4 = ["--tensor-model-parallel-size", "2"], ["--tensor-model-parallel-size", "4"]
PP2, CP2 = ["--pipeline-model-parallel-size", "2"], ["--context-parallel-size", "2"]
SP = ["--sequence-parallel"]
ROW = re.compile(r"^(\S.*?)  +(logits|fused head|data split)(, sparse teacher)? +(\S+) +\d+ +(\S+) +\d+ \w+ +(ok|FAIL)")


# ---- what every rank of the one launch runs


@contextlib.contextmanager
def _patched(owner, name, replacement):
    """replacement(original, *args, **kwargs) in place of a function."""
    original = getattr(owner, name)
    with mock.patch.object(owner, name, lambda *args, **kwargs: replacement(original, *args, **kwargs)):
        yield


def one_rank_left_out_of_the_merge():
    # Without a group it is the dense computation.
    return _patched(
        collectives, "gather_partials", lambda gather, partials, group: gather(partials, group)[: 3 if group else 1]
    )


def skewed_logits_on_rank_1():
    def loss(original, logits, *args, group=None, **kwargs):
        skew = 0.01 if group is not None and dist.get_rank() == 1 else 0
        return original(logits + skew, *args, group=group, **kwargs)

    return _patched(problem, "qtarget_cross_entropy", loss)


def hidden_gradients_not_summed():
    def total(original, partial, group):
        return partial if partial.shape[-1] == 32 and group.size() == 4 else original(partial, group)

    return _patched(collectives, "sum_in_place", total)


def sequence_gradients_not_summed():
    def shard(original, partial, group):
        return partial.chunk(collectives.size(group))[collectives.rank(group)]

    return _patched(collectives, "scatter_sequence_sum", shard)


def data_ranks_not_summed():
    return _patched(collectives, "sum_in_place", lambda total, partial, group: partial)


def last_bit_on_rank_3():
    def loss(original, *args, group=None, **kwargs):
        result = original(*args, group=group, **kwargs)
        if group is None or dist.get_rank() != 3:
            return result
        return torch.where(result == 0, result, result * (1 + 2**-23))

    return _patched(problem, "qtarget_cross_entropy", loss)


def exception_on_rank_2():
    def loss(original, *args, group=None, objective, **kwargs):
        if group is not None and dist.get_rank() == 2 and objective.name == "eaft":
            raise RuntimeError("the device fell off\nthe bus")
        return original(*args, group=group, objective=objective, **kwargs)

    return _patched(problem, "qtarget_cross_entropy", loss)


def other_version_on_rank_1():
    from qtarget_megatron.megatron.verify import layout

    return _patched(layout, "versions", lambda of: "version 0" if dist.get_rank() == 1 else of())


def hang_on_rank_1():
    """Until all others have ended."""

    def loss(original, *args, group=None, **kwargs):
        if group is not None and dist.get_rank() == 1:
            while shared_store().add("ended", 0) < dist.get_world_size() - 1:
                time.sleep(0.05)
        return original(*args, group=group, **kwargs)

    return _patched(problem, "qtarget_linear_cross_entropy", loss)


def shared_store():
    return dist.distributed_c10d._get_default_store()


# Name -> words, and what is broken meanwhile. Within the timeouts ranks compute what takes milliseconds when idle.
SOUND = {
    "tp1-dp4": [],
    "tp2-dp2": TP2,
    "tp2-pp2": [*TP2, *PP2, *FEW],
    "tp2-cp2-sp": [*TP2, *CP2, *SP, *FEW],
    "tp4": TP4,
    "tp4-reference": [*TP4, "--backend", "reference", "--seed", "3", *FEW],
    "tp4-sp": [*TP4, *SP],
    "tp4-bf16": [*TP4, "--bf16"],
    "tp4-sp-bf16": [*TP4, *SP, "--bf16", *FEW],
    "tp2-fp16": [*TP2, "--fp16", *FEW],
}
BROKEN = {
    "left out": (TP4, one_rank_left_out_of_the_merge),
    "left out, bf16": ([*TP4, "--bf16"], one_rank_left_out_of_the_merge),
    "skewed": ([*TP4, *FEW], skewed_logits_on_rank_1),
    "hidden": ([*TP4, "--bf16", *FEW], hidden_gradients_not_summed),
    "sequence": ([*TP4, *SP, "--bf16", *FEW], sequence_gradients_not_summed),
    "data": (["--bf16", *FEW], data_ranks_not_summed),
    "bits in a team": ([*TP2, *FEW], last_bit_on_rank_3),
    "bits in a replica": (FEW, last_bit_on_rank_3),
    "exception": ([*TP2, *FEW, "--timeout", "6"], exception_on_rank_2),
    "version": (FEW, other_version_on_rank_1),
    "hang": ([*TP2, *FEW, "--timeout", "4"], hang_on_rank_1),
}


def run_all() -> dict[str, tuple[int, str, str]]:
    """Exit code and both outputs of every case on this rank."""
    from megatron.core import parallel_state

    cases = {name: (words, contextlib.nullcontext) for name, words in SOUND.items()} | BROKEN
    found = {}
    for name, (words, broken) in cases.items():
        out, errors = io.StringIO(), io.StringIO()
        with broken(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            code = verify_parallel.main([*SMALL, *words])
        found[name] = code, out.getvalue(), errors.getvalue()
        if name == "hang" and dist.get_rank() != 1:
            shared_store().add("ended", 1)
        dist.barrier()
        parallel_state.destroy_model_parallel()
        for group in list(dist.distributed_c10d._world.pg_map):
            if group is not dist.group.WORLD:
                dist.destroy_process_group(group)
    return found


@pytest.fixture(scope="module")
def outcomes():
    """Of each rank, by case."""
    return run_ranks(4, run_all, timeout=200, megatron=True)


def rows(text: str) -> dict[tuple[str, str], tuple[float, float, bool]]:
    """(objective, kind) -> errors of loss and gradient, and whether they are ok."""
    found = [ROW.match(line) for line in text.splitlines()]
    return {
        (match[1], match[2] + (match[3] or "")): (float(match[4]), float(match[5]), match[6] == "ok")
        for match in filter(None, found)
    }


def wrong_kinds(text: str) -> set[str]:
    return {kind for (_, kind), (_, _, ok) in rows(text).items() if not ok}


several_ranks = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(300)]


def marked(function):
    for mark in several_ranks:
        function = mark(function)
    return function


# ---- the tests


@marked
@pytest.mark.parametrize("name", SOUND)
def test_a_sound_layout_passes(outcomes, name):
    code, text, errors = outcomes[0][name]
    assert code == 0, text + errors
    found = rows(text)
    assert all(ok for _, _, ok in found.values())
    every = chosen_objectives(FEW[1:] if FEW[0] in SOUND[name] else [])
    assert {objective for objective, _ in found} == {str(o) for o in every}
    assert len(found) == sum(5 if o.needs_teacher else 3 for o in every)
    assert text.splitlines()[-1].startswith(f"verified: {len(every)} objective(s) at TP {2 if 'tp2' in name else ''}")
    for rank in outcomes[1:]:
        assert rank[name][:2] == (0, "")


@marked
@pytest.mark.parametrize("name", BROKEN)
def test_all_ranks_end_alike_with_exit_code_1(outcomes, name):
    assert [rank[name][0] for rank in outcomes] == [1] * 4
    assert "\nNOT verified: " in outcomes[0][name][1]


@marked
@pytest.mark.parametrize("name", ["left out", "left out, bf16"])
def test_a_rank_left_out_of_the_merge_exceeds_the_bounds_by_far(outcomes, name):
    """In every row, ten times one of them."""
    bounds = LOSS_BOUND, gradient_bound(torch.bfloat16 if "bf16" in name else torch.float32, 4)
    found = rows(outcomes[0][name][1])
    assert len(found) > 60
    for row, (loss, gradient, ok) in found.items():
        assert not ok and (loss > 10 * bounds[0] or gradient > 10 * bounds[1]), (row, loss, gradient)


@marked
@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("skewed", {"logits", "logits, sparse teacher"}),
        ("hidden", {"fused head", "fused head, sparse teacher"}),
        ("sequence", {"fused head", "fused head, sparse teacher"}),
        ("data", {"data split"}),
    ],
)
def test_what_is_broken_is_the_row_that_fails(outcomes, name, kinds):
    text = outcomes[0][name][1]
    assert wrong_kinds(text) == kinds
    for (objective, kind), (_, _, ok) in rows(text).items():
        assert ok == (kind not in kinds), (objective, kind)


@marked
def test_a_difference_in_the_last_bit_is_found_and_located(outcomes):
    assert "FAIL: the loss of ranks 2 and 3 of one tensor-parallel group differs" in outcomes[0]["bits in a team"][1]
    assert "FAIL: the loss of ranks 0 and 3, replicas of each other" in outcomes[0]["bits in a replica"][1]


@marked
def test_an_exception_is_reported_with_its_rank_and_ends_all_ranks(outcomes):
    text = outcomes[0]["exception"][1]
    assert "ended after 3 rows: eaft(" in text
    assert "rank 2: RuntimeError: the device fell off" in text
    assert "the bus" in outcomes[2]["exception"][2]  # the whole of it, where it happened


@marked
def test_ranks_that_were_started_otherwise_are_named(outcomes):
    text = outcomes[0]["version"][1]
    assert re.search(r"ended after 0 rows: rank 0 has qtarget_megatron .*, rank 1 has version 0: start all", text)


@marked
def test_a_rank_that_hangs_is_named(outcomes):
    """It goes on when all others have ended, not before."""
    assert re.search(r"not all ranks answered: .*[Rr]anks? 1\b", outcomes[0]["hang"][1])


@marked
def test_the_command_under_torchrun():
    done = run_torchrun(2, ["qtarget_megatron.verify", *SMALL, *TP2, *SP, *FEW], timeout=200)
    assert done.returncode == 0, done.stdout
    assert len(rows(done.stdout)) == 16
    assert "TP 2 with sequence parallel, PP 1, CP 1, DP 1 on 2 rank(s) over " in done.stdout


@marked
def test_one_process_needs_no_launcher_and_takes_objectives_of_the_user(tmp_path):
    """By its path. The second objective raises: what was verified before is printed, and the exit code is 1."""
    mine = tmp_path / "mine.py"
    mine.write_text(
        "from qtarget_megatron import Objective, objectives\n"
        "@objectives.register('mine')\n"
        "def mine() -> Objective:\n"
        "    return Objective(lambda s, x: (-x['own'] * s.log_p, x['own'], ()), token_inputs=('own',))\n"
        "@objectives.register('faulty')\n"
        "def faulty() -> Objective:\n"
        "    return Objective(lambda s, x: (s.no_such_statistic, 1, ()))\n"
    )
    command = [sys.executable, str(REPOSITORY / "tools" / "verify_parallel.py"), *SMALL]
    command += ["--objective-file", str(mine), "--objective", "mine", "faulty"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=800)
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(rows(done.stdout)) == {("mine()", kind) for kind in ("logits", "fused head", "data split")}
    assert all(ok for _, _, ok in rows(done.stdout).values())
    assert "ended after 3 rows: faulty(): rank 0: AttributeError" in done.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_objective_is_far_below_the_bounds_on_one_rank(dtype):
    """float32: a fifth, so that larger vocabularies and more ranks fit. 16 bits: their roundings are the bound."""
    problem = draw(dtype)
    for objective in chosen_objectives([]):
        for sparse in (False, True) if objective.needs_teacher else (False,):
            for kind, errors in measure(problem, objective, Setting(), sparse=sparse).items():
                assert errors.loss < LOSS_BOUND / 5, (objective, kind)
                part = 0.2 if dtype == torch.float32 else 0.75
                if objective.request.reverse_cross:
                    # Rounded at the size of a log ratio, which a row of the problem has of some hundred nats.
                    part = max(part, 0.4)
                assert errors.gradient < part * gradient_bound(dtype, 1), (objective, kind)


def draw(dtype=torch.float32, **changes):
    settings = dict(vocab_size=500, hidden=32, tokens=40, seed=1, ranks=1, device=torch.device("cpu"))
    return Problem.draw(dtype=dtype, **settings | changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hidden", [16, 64, 256])
def test_logits_of_the_problem_are_exact_in_16_bits(dtype, hidden):
    problem = draw(dtype, hidden=hidden, ranks=4)
    assert torch.equal((problem.hidden @ problem.weight.t()).double(), problem.logits)
    assert torch.equal((problem.teacher_hidden @ problem.teacher_weight.t()).double(), problem.teacher_logits)


def test_the_problem_holds_what_a_layout_can_get_wrong():
    problem = draw(ranks=4)
    assert problem.logits.shape == (40, 512)
    labels = set(problem.labels.tolist())
    assert {-100, 0, 127, 128, 255, 256, 383, 384, 499} <= labels and max(labels) == 499
    log_p = problem.logits[:, :500].log_softmax(-1).gather(-1, problem.labels.clamp(min=0)[:, None])[problem.supervised]
    assert log_p.max() > -1e-3 and log_p.min() < -100
    assert ((log_p > -2) & (log_p < -0.1)).sum() > 3
    assert torch.equal(draw(ranks=4).logits, problem.logits) and not torch.equal(
        draw(ranks=4, seed=2).logits, problem.logits
    )


def test_parameters_are_known_for_every_objective_without_defaults():
    assert [o.name for o in chosen_objectives([])] == objectives.names()
    assert str(chosen_objectives(["sft_kl"])[0]) == "sft-kl(lam=0.5)"
    assert str(chosen_objectives(["target-sft:eta=0.3"])[0]) == "target-sft(eta=0.3)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (TP2, "tensor 2 x pipeline 1 x context 1 takes a multiple of 2 ranks, got 1"),
        (["--pipeline-model-parallel-size", "0"], "--pipeline-model-parallel-size must be 1 or more, got 0"),
        (["--objective", "nothing"], "unknown objective 'nothing': expected one of "),
        (["--objective", "dft:eta=1"], "has no parameter 'eta'"),
        (["--vocab-size", "20"], "--vocab-size must be 32 or more, got 20"),
        (["--hidden", "512"], "--hidden must be 16 to 256"),
        (["--tokens", "4"], "--tokens must be 8 or more, got 4"),
        (["--timeout", "0"], "--timeout must be above 0 seconds, got 0"),
        (["--backend", "gpu"], "unknown backend 'gpu'"),
        (["--bf16", "--fp16"], "--fp16: not allowed with argument --bf16"),
        (["--no-such-flag"], "unknown flag --no-such-flag: --help lists the flags"),
        (["--keep", "DIR"], "--keep keeps what one rank computes for --train"),
        (["--bf16", "--train", "--hf-model", "DIR"], "--bf16 stands before --train"),
        (["--timeout", "0", "--train", "--hf-model", "DIR"], "--timeout must be above 0 seconds, got 0"),
        (["--train"], "the following arguments are required: --hf-model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, monkeypatch, words, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    code = verify_parallel.main(words)
    printed = capsys.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.count("\n") == 1 and printed.err.startswith("verify: error: ")
    assert message in printed.err


def test_sequence_parallel_wants_tokens_that_divide(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert verify_parallel.main([*TP4, *SP, "--tokens", "42"]) == 2
    assert "give --tokens a multiple of 4, got 42" in capsys.readouterr().err


def test_help_teaches_the_command(capsys):
    with pytest.raises(SystemExit) as ended:
        verify_parallel.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    for part in (
        "torchrun --nproc-per-node 8 -m qtarget_megatron.verify",
        "(2 + T) u",
        "Exit code on every rank",
    ):
        assert part in text
