"""The steps of make gpu, as far as they run on a CPU: what they start, what they read, what they lack."""

from __future__ import annotations

import importlib
import inspect
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from launching import REPOSITORY

from qtarget_megatron import objectives
from qtarget_megatron.commands import convert_hf, verify_parallel
from qtarget_megatron.huggingface import Architecture
from qtarget_megatron.megatron.verify import layout
from tools.benchmarking import head, peers, report, step, workers
from tools.first_hour import checks, families, steps, sync_waits, training, ways
from tools.first_hour.steps import STEPS
from tools.first_hour.work import Failed, NotRun, Work


def test_every_step_names_a_function_that_takes_its_arguments():
    for step_ in STEPS:
        module, _, name = step_.function.partition(":")
        function = getattr(importlib.import_module(module), name)
        inspect.signature(function).bind(None, **step_.arguments)
    assert steps.FAMILIES == tuple(families.FAMILIES)


@pytest.fixture
def work(tmp_path):
    return Work(tmp_path, tmp_path / "log", 100, 1, (8, 0))


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        ("checks:losses_on_a_device", {"way": "second device"}, "it needs 2 GPUs, and there is 1"),
        ("checks:verify_parallel", {}, "it needs 2 GPUs"),
        ("training:finetune", {"layers": "engine"}, "Transformer Engine is not installed"),
        ("training:finetune", {"layers": "apex"}, "Apex's fused_weight_gradient_mlp_cuda is not installed"),
        ("training:convert", {"family": "llama2"}, "Transformer Engine is not installed"),
        ("training:context_parallel", {}, "Transformer Engine is not installed"),
        ("training:with_and_without", {"flags": [], "gpus": 2}, "it needs 2 GPUs"),
        ("training:with_and_without", {"flags": [], "engine": True}, "Transformer Engine is not installed"),
        ("training:fp8", {}, "Transformer Engine is not installed"),
        ("checks:sanitizer", {"tool": "memcheck"}, "compute-sanitizer is neither in CUDA_HOME/bin nor on PATH"),
    ],
)
def test_what_is_not_there_is_named(work, monkeypatch, function, arguments, reason):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CUDA_HOME", "")
    module, _, name = function.partition(":")
    with pytest.raises(NotRun, match=re.escape(reason)):
        getattr({"checks": checks, "training": training}[module], name)(work, **arguments)


def test_an_older_gpu_has_no_8_bit_products(work, monkeypatch):
    monkeypatch.setattr(Work, "needs_engine", lambda self: None)
    with pytest.raises(NotRun, match="sm_89 or newer, and this is sm_80"):
        training.fp8(work)


@pytest.fixture(autouse=True, scope="module")
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def measured(one_rank):
    """Rows of the head with its peers, one of which computes something else; what was said."""

    def wrong(hidden, weight, labels):
        return (hidden @ weight.t()).square().sum()

    case = dict(tokens=8, hidden=16, vocabulary=64, dtype="float32", chunk_sizes=[4, 8], supervised=[1.0], peers=True)
    right, said = peers.linear_cross_entropies(torch.device("cpu"), None), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(peers, "linear_cross_entropies", lambda device, group: right | {"wrong": wrong})
        return head.measure(say=said.append, cases=[case], seconds=0, min_rounds=1), said


def test_a_peer_that_computes_something_else_is_left_out(measured):
    rows, said = measured
    assert any(line.startswith("left out: wrong: RuntimeError: wrong: loss differs") for line in said)
    methods = [(row["method"], row["chunk_size"]) for row in rows]
    has_torchs = hasattr(torch.nn.functional, "linear_cross_entropy")
    assert ("wrong", None) not in methods and (("torch, linear_cross_entropy", None) in methods) == has_torchs
    assert {(head.FUSED, 4), (head.FUSED, 8), (head.FROZEN, 4), (head.FROZEN, 8)} < set(methods)


def test_peers_that_are_not_there_are_named(work, monkeypatch, measured):
    monkeypatch.setattr(peers, "_has", lambda module: module.startswith("liger"))
    assert peers.not_installed() == ["transformer-engine"]
    said = "".join(f"head 1 s  {line}\n" for line in measured[1])
    monkeypatch.setattr(Work, "python", lambda self, *words: said)
    monkeypatch.setattr(report, "load", lambda folder, name: {"rows": measured[0]})
    lines = checks.benchmark(work, "cuda-head")
    assert lines[0] == "Not installed, and so not compared with: transformer-engine."
    assert sum(line.startswith("left out: wrong: ") for line in lines) == 1
    assert any(line.startswith("#### sft, 8 tokens") for line in lines)
    assert "| chunk | ms for the weight's gradient | of the fused head's time |" in lines


def test_objectives_are_compared_however_they_are_called():
    calls = []

    def run(compute):
        calls.append(compute)
        return compute()

    def off(compute):
        loss, *gradients = compute()
        return loss * 1.01, *gradients

    cpu, chosen = torch.device("cpu"), [objectives.sft(), objectives.target_sft()]
    assert ways.compare(cpu, torch.float32, run, chosen).startswith("6 comparisons, loss off by ")
    assert len(calls) == 4  # the data split is not called that way
    with pytest.raises(Failed, match=r"^4 of 6 beyond 5e-05 and 5.0e-05: sft\(\), logits: loss .*; target-sft"):
        ways.compare(cpu, torch.float32, off, chosen)


def test_a_batch_without_labels():
    ways.no_labels(say=print, device="cpu")


def test_what_the_tools_print_is_read():
    table = "objective  kind        loss rank  gradient rank of      bounds 5.0e-05 5.9e-03\n"
    row = "{}        logits    1.5e-06    0   3.0e-03    0 logits  {}\n"
    end = "verified: 2 objective(s) at TP 1\n"
    found = checks.worst(table + row.format("sft", "ok") + row.format("dft", "ok").replace("1.5e-06", "2.5e-06") + end)
    assert found == f"2 comparisons, loss off by 2.5e-06 and gradient by 3.0e-03 at most. {end.strip()}"
    for text in ("", table + end, table + row.format("sft", "ok") + row.format("dft", "FAIL: bits") + end):
        with pytest.raises(Failed):
            checks.worst(text)
    assert checks.summary("...\n12 passed, 3 deselected in 1.50s (0:00:01)\n") == "12 passed, 3 deselected"
    for text in ("", "5 deselected in 0.1s\n"):
        with pytest.raises(Failed):
            checks.summary(text)
    assert checks.errors("========= ERROR SUMMARY: 0 errors\n") == 0
    assert checks.errors("===== RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n") == 0
    for text in ("", "========= ERROR SUMMARY: 1 error\n", "= RACECHECK SUMMARY: 2 hazards displayed\n"):
        with pytest.raises(Failed):
            checks.errors(text)


def test_the_table_of_verify_parallel_is_read(monkeypatch, capsys):
    def verify_two(options, objectives, on_row):
        for number, objective in enumerate(objectives, 1):
            on_row(layout.Row(str(objective), "fused head, sparse teacher", 1e-7, 0, number * 1e-3, 3, "weight", 1, 1))
        return layout.Verdict((), "TP 1")

    monkeypatch.setattr(layout, "verify", verify_two)
    assert verify_parallel.main(["--objective", "sft", "kd:temperature=2"]) == 0
    assert checks.worst(capsys.readouterr().out) == (
        "2 comparisons, loss off by 1.0e-07 and gradient by 2.0e-03 at most. verified: 2 objective(s) at TP 1"
    )


def test_the_sanitized_tests_are_there():
    source = (REPOSITORY / "tests/unit/test_native_kernels.py").read_text()
    for name in checks.SANITIZED.values():
        assert f"def {name.partition('[')[0]}(" in source


def test_layouts_use_all_gpus():
    assert checks.layouts(1) == []
    two, four, eight = checks.layouts(2), checks.layouts(5), checks.layouts(8)
    assert [size for _, size in two] == [2] and [size for _, size in four] == [4, 4]
    assert [size for _, size in eight] == [8, 8, 8]
    assert eight[2][0] == [
        "--tensor-model-parallel-size", "4", "--pipeline-model-parallel-size", "2", "--sequence-parallel",
    ]  # fmt: skip


LOG = """\
/a/b/site-packages/torch/cuda/x.py:3: UserWarning: called a synchronizing CUDA operation (Triggered internally at)
  x
 [2026-11-29 01:29:07.7] iteration        2/       4 | consumed samples: 4 | lm loss: 6.5E+00 | grad norm: 1.5 |
/home/me/qtarget_megatron/megatron/training/step.py:20: UserWarning: called a synchronizing CUDA operation (Triggered
/a/site-packages/megatron/training/training.py:7: UserWarning: called a synchronizing CUDA operation (Triggered
/home/me/qtarget_megatron/megatron/training/step.py:20: UserWarning: called a synchronizing CUDA operation (Triggered
 [2026-11-29 01:29:07.8] iteration        3/       4 | consumed samples: 6 | lm loss: 6.25E+00 | grad norm: 1.25 |
/home/me/after.py:1: UserWarning: called a synchronizing CUDA operation
"""


def test_waits_of_the_last_step_are_counted_by_line():
    assert sync_waits.waits(LOG) == {
        "qtarget_megatron/megatron/training/step.py:20": 2,
        "megatron/training/training.py:7": 1,
    }
    assert sync_waits.waits(LOG[: LOG.index("3/       4")]) is None


def test_curves_are_read_and_compared(work, monkeypatch):
    monkeypatch.setattr(Work, "ranks", lambda self, words, size, environment=None: LOG)
    shape = step.Shape(steps=3)
    curves = work.train(shape, [])
    assert curves == {"lm loss": [6.5, 6.25], "grad norm": [1.5, 1.25]}
    with pytest.raises(Failed, match="expected 3 finite values or more"):
        work.train(step.Shape(steps=4), [])
    bounds = training.BOUNDS["float32"]
    assert training.beside(curves, curves, bounds) == "lm loss off by 0.0e+00 of 1e-04 allowed, " + (
        "grad norm off by 0.0e+00 of 1e-03 allowed"
    )
    with pytest.raises(Failed, match="grad norm is off by 2.0e-01, 1e-03 allowed"):
        training.beside(curves, curves | {"grad norm": [1.5, 1.5625]}, bounds)


def test_flags_are_tried_beside_a_run_without(work, monkeypatch):
    started = []

    def train(self, shape, words, size):
        started.append((words, size))
        off = 2.0 if "--rough" in words else 1.0
        return {"lm loss": [off], "grad norm": [off]}

    monkeypatch.setattr(Work, "train", train)
    (line,) = training.with_and_without(work, ["--flag"], plain=["--plain"], tied=True)
    assert line.startswith("losses 1.000000; beside a run without: lm loss off by 0.0e+00")
    assert started == [(["--objective", "sft", "--bf16", "--plain", *more], 1) for more in ([], ["--flag"])]
    assert json.loads((work.folder / "student/config.json").read_text())["tie_word_embeddings"]
    with pytest.raises(Failed, match=r"lm loss is off by 1.0e\+00"):
        training.with_and_without(work, ["--rough"])


def test_commands_go_to_the_log_and_end_at_the_limit(work):
    assert work.python("-c", "print('one')") == "one\n"
    assert work.python("-c", "import os; print(os.environ['TWO'])", environment={"TWO": "two"}) == "two\n"
    assert work.log.read_text() == "one\ntwo\n"
    with pytest.raises(workers.MeasurementFailed, match="python.* ended with status 5(.|\n)*its last words"):
        work.python("-c", "print('its last words'); raise SystemExit(5)")


def test_a_family_is_converted_both_ways(work, monkeypatch):
    """Its commands do as they should; that they do is tested elsewhere."""

    def ranks(self, words, size, environment):
        if words[1] == "export":
            shutil.copytree(work.folder / "model", work.folder / "exported")
        return f"check: over 40 tokens {words[-1]}\n" if words[1] == "check" else "import: done\n"

    monkeypatch.setattr(Work, "needs_engine", lambda self: None)
    monkeypatch.setattr(Work, "ranks", ranks)
    lines = training.convert(work, "qwen2")
    assert lines[1:] == [
        "- its checkpoint: over 40 tokens checkpoint",
        "- a checkpoint of local layers: over 40 tokens local",
    ]
    monkeypatch.setattr(training, "different_tensors", lambda one, other: ["a.weight"])
    shutil.rmtree(work.folder / "exported")
    with pytest.raises(Failed, match="1 tensors are not exported as they were imported: a.weight"):
        training.convert(work, "qwen2")


@pytest.mark.parametrize("family", ["llama3", "qwen3_moe", "deepseek_v3"])
def test_models_of_the_engine_s_sizes(tmp_path, family):
    training.write_family(tmp_path, family)
    config = json.loads((tmp_path / "model/config.json").read_text())
    Architecture.from_hf(tmp_path / "model")  # it is one of those that are served
    assert config["hidden_size"] == 256 and config["num_attention_heads"] == 4
    assert len((tmp_path / "text").read_text().split()) == 40
    assert training.different_tensors(tmp_path / "model", tmp_path / "model") == []
    for words in training.conversions():
        ours, rest = convert_hf.command_line().parse_known_args(words)
        assert ours.hf_model == Path("model") and set(rest) <= set(training._LOCAL)
