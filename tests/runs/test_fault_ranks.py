"""Ranks that were started otherwise, hang, or meet a NaN: all end, or go on, alike, and one line names them."""

import json
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from fault_runs import (
    OtherVersion,
    Signal,
    SlowData,
    curves,
    error_lines,
    launch,
    launch_many,
    launch_to_its_end,
    texts,
)
from finetune_runs import COMMON, write_data, write_models
from layout_runs import tensors
from row_data import padded_rows
from transformers import AutoTokenizer

from qtarget_megatron.data import JsonlFile
from qtarget_megatron.megatron.faults.same_start import difference
from qtarget_megatron.megatron.faults.watchdog import Report, Watchdog, who_waits

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

DISTRIBUTED_OPTIMIZER = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
STEPS = 5
OBJECTIVE = """
import torch
from qtarget_megatron import Objective, objectives

@objectives.register("NAME")
def sft_with_nan() -> Objective:
    def evaluate(stats, inputs):
        spoiled = inputs["spoiled"] > 0
        one = torch.ones_like(stats.log_p)
        return torch.where(spoiled, torch.nan, -stats.log_p), torch.where(spoiled, torch.nan, one), ()
    return Objective(evaluate, token_inputs=("spoiled",))
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    write_data(folder / "other.jsonl", 40, seed=2)
    return folder


def command(workspace, *more, objective="dft", data="train.jsonl"):
    words = ["--hf-model", workspace / "untied", "--sft-train", workspace / data, "--objective", objective]
    return texts([*COMMON, *words, "--train-iters", STEPS, "--micro-batch-size", 2, *more])


# ---- started otherwise


@pytest.fixture(scope="module")
def disagreements(workspace):
    """What each rank says where rank 1 has been started with other words than rank 0."""
    (workspace / "copy").mkdir()
    shutil.copytree(workspace / "untied", workspace / "copy" / "untied")
    shutil.copy(workspace / "train.jsonl", workspace / "copy")
    for name, value in (("mine.py", 1), ("other.py", 2)):
        text = "from qtarget_megatron import objectives\nobjectives.register('mine')(objectives.published.sft)\n"
        (workspace / name).write_text(f"{text}# {value}\n")
    smaller = Path(shutil.copytree(workspace / "untied", workspace / "smaller"))
    config = smaller / "config.json"
    config.write_text(config.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))
    assert config.read_text() != (workspace / "untied" / "config.json").read_text()

    def flag(name, value):
        return [*command(workspace), name, str(value)]

    objective = [flag("--objective-file", workspace / name) for name in ("mine.py", "other.py")]
    words = {
        "data": [command(workspace), command(workspace, data="other.jsonl")],
        "objective": objective,
        "model": [command(workspace), flag("--hf-model", smaller)],
        "seed": [command(workspace), flag("--seed", 8)],
        # Not seen in time, these would leave both ranks waiting in the making of process groups.
        "layout": [command(workspace, *TP2), command(workspace, *PP2)],
        "fewer flags": [command(workspace, "--sequence-parallel", *TP2), command(workspace, *TP2)],
        "copies": [
            command(workspace, "--exit-interval", 1),
            command(workspace / "copy", "--exit-interval", 1),
        ],
    }
    cases = {name: (texts(pair), None) for name, pair in words.items()}
    cases["version"] = (command(workspace), OtherVersion(1))  # the last one: it stays
    return launch_many(cases, workspace)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("data", r"rank 0 has --sft-train of SHA-256 \w{16}, rank 1 has --sft-train of SHA-256 \w{16}: start all"),
        ("objective", r"rank 0 has --objective-file of SHA-256 \w{16}, rank 1 has --objective-file of"),
        ("model", r"rank 0 has --hf-model of SHA-256 \w{16}, rank 1 has --hf-model of"),
        ("seed", "rank 0 has --seed 7, rank 1 has --seed 8: start all ranks alike"),
        ("layout", "rank 0 has --tensor-model-parallel-size 2, rank 1 has no --tensor-model-parallel-size: start"),
        ("fewer flags", "rank 0 has --sequence-parallel True, rank 1 has no --sequence-parallel: start"),
        ("version", r"rank 0 has qtarget_megatron .*, torch .*, megatron-core .*, rank 1 has qtarget_megatron 0.0: "),
    ],
)
def test_a_rank_that_was_started_otherwise_is_refused_on_all_ranks(disagreements, name, message):
    assert [rank[name]["code"] for rank in disagreements] == [2, 2], disagreements[0][name]["printed"][-3000:]
    (line,) = error_lines(disagreements[0][name]["printed"])
    assert re.search(message, line), line


def test_copies_of_the_same_files_are_the_same(disagreements):
    assert [rank["copies"]["code"] for rank in disagreements] == [0, 0], disagreements[1]["copies"]["printed"][-3000:]
    # --exit-interval is what was asked for: exit code 0, and a line of what is left to do.
    line = f"finetune: ended by --exit-interval 1 at step 1 of {STEPS}; nothing was saved, as --save was not given"
    assert disagreements[0]["copies"]["printed"].splitlines()[-1] == line
    assert "finetune:" not in disagreements[1]["copies"]["printed"]


def test_what_most_ranks_have_is_right():
    usual, other = {"--seed": "--seed 1"}, {"--seed": "--seed 2"}
    assert difference([usual] * 5) is None
    assert difference([other, usual, usual]).startswith("rank 1 has --seed 1, rank 0 has --seed 2: start all")
    assert difference([usual, other, usual, other, usual]).startswith("rank 0 has --seed 1, ranks 1, 3 have --seed 2: ")
    many = difference([usual] * 20 + [{}] * 10)
    assert many.startswith("rank 0 has --seed 1, ranks 20, 21, 22, 23, 24, 25, 26, 27 and 2 more have no --seed: ")


# ---- a rank that hangs

# What a collective of milliseconds may take on a busy machine; the line comes after half of it.
TIMEOUT = ["--distributed-timeout-seconds-after-init", 12]


@pytest.mark.parametrize(
    ("happening", "speaker", "what"),
    [
        (Signal(1, step=3, later=0, number=signal.SIGSTOP), 0, r"rank 1 \(host .*\), which is not running \(stopped,"),
        (Signal(0, step=3, later=0, number=signal.SIGSTOP), 1, r"rank 0 \(host .*\), which is not running \(stopped,"),
        (SlowData(1, item=16), 0, r"rank 1 \(host .*, seen in step 3\), which is reading its data"),
    ],
)
def test_a_rank_that_hangs_is_named_before_the_others_end(workspace, happening, speaker, what):
    printed = launch_to_its_end(command(workspace, *TIMEOUT), workspace, happening, speaker=speaker)
    # A busy machine may be slow in a step before.
    named = re.search(rf"step \d has not moved for \d+ s: the others wait for {what}", printed)
    assert named is not None, printed[-3000:]
    (line,) = error_lines(printed)
    assert "another rank has ended, or does not answer" in line and printed.index(line) > named.end()


def test_a_rank_that_has_begun_to_train_has_reported_and_a_slow_first_step_is_no_hang():
    """Without Megatron's loop, and without the thread's rhythm: what it would read and how long it would wait."""
    store = dist.HashStore()
    args = SimpleNamespace(distributed_timeout_minutes=10, curr_iteration=6)
    args.distributed_timeout_seconds_after_init = 3000  # the thread is silent for 10 s
    with Watchdog(args, store, rank=0, world_size=1) as watchdog:
        (report,) = watchdog._read()
        assert (report.beat, report.count, report.step) == (0, 0, 7)
    args.distributed_timeout_seconds_after_init = 12
    forward = watchdog.watched(lambda iterator, model: None)
    assert watchdog._patience() == 200
    forward(None, None)
    assert watchdog._patience() == 200, "other ranks may still read the model, or compile"
    args.curr_iteration += 1
    forward(None, None)
    assert watchdog._patience() == 4


def reports(*places, step=4, beat=7):
    return [place and Report(beat, 30, step, "node", place) for place in places]


def test_the_rank_that_stands_out_is_named():
    waiting, reading, code = "waiting for others", "reading its data", "mine.py:3 (evaluate)"

    def line(second, first=None):
        return who_waits(first or reports(*["x"] * len(second), beat=3), second, 4, 61.2)

    assert "wait for rank 1 (host node, seen in step 4), which is reading its data" in line(
        reports(waiting, reading, waiting)
    )
    assert "wait for rank 2 (host node, seen in step 4), which does not wait, at mine.py:3 (evaluate)" in line(
        reports(waiting, waiting, code)
    )
    behind = reports(waiting, waiting) + reports(waiting, step=3)
    assert "wait for rank 2 (host node, seen in step 3), which is in an earlier step" in line(behind)
    assert "wait for rank 0, which has never reported" in line(reports(None, code, waiting))
    before, after = reports(*"xxx", beat=3), reports(waiting, waiting, reading)
    after[1] = before[1]
    assert "rank 1 (host node, seen in step 4), which is not running" in line(after, before)
    assert line(reports(code, code)).endswith("on any rank, and none stands out: 2 at mine.py:3 (evaluate)")
    assert "step 4 has not moved for 61 s" in line(reports(waiting, reading))


# ---- NaN


@pytest.fixture(scope="module")
def spoiled(workspace):
    """Data with one sample whose loss is NaN, in step 1 or 3, on the second of two data-parallel ranks."""
    tokenizer = AutoTokenizer.from_pretrained(workspace / "untied")
    records = [json.loads(line) for line in (workspace / "train.jsonl").read_text().splitlines()]
    found = {}
    order = [int(item["sample"]) for item in dataset(workspace, tokenizer)]
    for step in (1, 3):
        # Micro-batches of 2 go to the two ranks in turn.
        found[step] = order[8 * (step - 1) + 6]
        lines = [json.dumps(record | {"spoiled": int(number == found[step])}) for number, record in enumerate(records)]
        (workspace / f"spoiled-{step}.jsonl").write_text("\n".join(lines))
    return found


def dataset(workspace, tokenizer):
    file = JsonlFile(workspace / "train.jsonl")
    data = padded_rows(file, tokenizer, 32, num_rows=8 * STEPS, seed=7)
    return [data[index] for index in range(len(data))]


def nan_command(workspace, step, *more, number=0):
    """number: an objective's name can be registered once in a process."""
    name = f"spoiled-{number}"
    path = workspace / f"{name}.py"
    path.write_text(OBJECTIVE.replace("NAME", name))
    return command(workspace, "--objective-file", path, *more, objective=name, data=f"spoiled-{step}.jsonl")


@pytest.mark.parametrize("step", [1, 3])
def test_a_nan_stops_all_ranks_and_names_rank_step_and_sample(workspace, spoiled, step):
    printed = launch_to_its_end(nan_command(workspace, step), workspace, None, speaker=1)
    (line,) = error_lines(printed)
    assert line.startswith(f"finetune: error on rank 1: step {step}: the loss of record(s) [")
    assert f"{spoiled[step]}" in re.search(r"record\(s\) \[(.*)\] of \S+ \(counted from 0\) is nan on rank 1", line)[1]
    assert "--qtarget-on-nan skip" in line


LEFT_OUT = ["--iterations-to-skip", 3]
# Layout, and what makes Megatron do nothing in step 3. That it cannot at TP2, where the training ends with that step.
SKIPPING = {
    "DP2 with the distributed optimizer": (DISTRIBUTED_OPTIMIZER, [], LEFT_OUT),
    "DP2 in bfloat16": (["--bf16"], [], LEFT_OUT),
    "PP2 with the distributed optimizer": ([*DISTRIBUTED_OPTIMIZER, *PP2], [], LEFT_OUT),
    "TP2 in bfloat16": (["--bf16", *TP2], ["--train-iters", 3], ["--train-iters", 2]),
}


def test_a_skipped_step_changes_nothing_on_any_rank(workspace, spoiled):
    """Bit for bit what a training does that leaves the step out; Megatron compares the replicas after each step."""
    cases = {}
    for name, (layout, shared, left_out) in SKIPPING.items():
        for way, words in (("skip", [*shared, "--qtarget-on-nan", "skip"]), ("nothing", left_out)):
            folder = workspace / f"{name}, {way}"
            words = [*layout, *words, "--save-hf", folder, "--save-hf-dtype", "float32", "--tensorboard-dir"]
            words += [workspace / f"board {folder.name}", "--check-weight-hash-across-dp-replicas-interval", 1]
            cases[folder.name] = (nan_command(workspace, 3, *words, number=len(cases)), None)
    results = launch_many(cases, workspace)
    before = tensors(workspace / "untied")
    for name in SKIPPING:
        for case in (f"{name}, skip", f"{name}, nothing"):
            for result in results:
                assert result[case]["code"] in (0, None), result[case]["printed"][-3000:]
        # The log line is the last rank's.
        printed = "".join(result[f"{name}, skip"]["printed"] for result in results)
        assert re.search(r"iteration\s+3/.*number of skipped iterations:\s+1 ", printed)
        said = re.findall(
            r"step 3 is skipped: the loss of record\(s\) \[(.*)\] of \S+ \(counted from 0\) is nan on", printed
        )
        assert len(said) == 1 and str(spoiled[3]) in said[0].split(", ")
        skip, expected = (tensors(workspace / f"{name}, {way}") for way in ("skip", "nothing"))
        assert all(torch.equal(skip[key], tensor) for key, tensor in expected.items()), name
        assert not any(torch.equal(skip[key], tensor) for key, tensor in before.items())
    boards = [curves(workspace / f"board DP2 in bfloat16, {way}") for way in ("skip", "nothing")]
    for tag in ("lm loss", "grad-norm"):
        assert boards[0][tag][-2:] == boards[1][tag][-2:], tag


def test_sigterm_ends_at_once_where_it_is_asked_for(workspace):
    words = command(workspace, "--exit-interval", 1)
    assert [result["handled"] for result in launch(words, workspace)] == [True, True]
    words = command(workspace, "--no-exit-signal-handler", "--exit-interval", 1)
    assert [result["handled"] for result in launch(words, workspace)] == [False, False]
