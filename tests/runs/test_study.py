"""The study's driver: killed and begun again, the same from the same seed, and what fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from launching import REPOSITORY
from study_runs import written

from examples.study import jobs
from examples.study.conditions import condition_of
from examples.study.evaluate import evaluate
from examples.study.results import unpack
from examples.study.runs import Run
from examples.study.study_file import read_study
from examples.study.tasks import TASKS, Condition, problems


def command(study: Path, out: Path, *words) -> list[str]:
    # Sums over more threads have other last bits, and how many a machine's cores make is its own.
    words = ("--study", study, "--out", out, "--threads", 1, *words)
    return [sys.executable, "-m", "examples.study.run", *map(str, words)]


def run(study: Path, out: Path, *words, code: int = 0) -> str:
    done = subprocess.run(command(study, out, *words), cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def results(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def measured(lines: list[dict]) -> dict:
    return {line["arm"]: (line["metrics"], line["outcomes"], line["training"]) for line in lines}


# ---- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that ran through: its file and folder, and what was printed."""
    folder = tmp_path_factory.mktemp("study")
    study = written(folder / "tiny.toml")
    return study, folder / "out", run(study, folder / "out")


@pytest.mark.slow
def test_a_study_runs_through_and_reports(whole):
    study, out, printed = whole
    lines = results(out)
    assert [line["arm"] for line in lines] in (["sft", "target-sft 0.5"], ["target-sft 0.5", "sft"])
    for line in lines:
        assert {"dev", "greedy", "sampled", "nll", "kl", "untouched", "p right"} <= line["metrics"].keys()
        assert {name: len(unpack(bits)) for name, bits in line["outcomes"].items()} == {"greedy": 60, "sampled": 60}
        assert line["training"]["total mass"] == pytest.approx(1, abs=1e-5) and line["seconds"]["train"] > 0
        assert line["training"]["loss first"] > 0
    assert "study: Tiny: 2 runs, 0 of them done" in printed and "study: 2/2 clean tiny" in printed
    report = (out / "REPORT.md").read_text()
    assert (
        report.startswith("# Tiny\n\n2 runs of 3 steps") and "| clean | tiny | likeliest answer | tie | tie |" in report
    )
    # Neither models nor folders of runs are left.
    assert [path.suffix for path in (out / "runs").iterdir()] == [".log", ".log"]


@pytest.mark.slow
def test_what_is_done_is_not_run_again_and_only_what_is_lost_is(whole, tmp_path):
    study, out, _ = whole
    before = results(out)
    assert "study: Tiny: 2 runs, 2 of them done" in run(study, out)
    assert results(out) == before
    # The last line was cut by the end of a machine: that run is made again, with the same numbers.
    text = (out / "results.jsonl").read_bytes()
    (out / "results.jsonl").write_bytes(text[:-50])
    assert "study: Tiny: 2 runs, 1 of them done" in run(study, out)
    assert measured(results(out)) == measured(before)
    (out / "results.jsonl").write_bytes(text)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_study(whole, tmp_path):
    """Base models included, and whatever the order in which two workers do it."""
    study, out, _ = whole
    run(study, tmp_path / "again", "--workers", 1)
    assert measured(results(tmp_path / "again")) == measured(results(out))


@pytest.mark.slow
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_study_that_is_killed_goes_on(whole, tmp_path, end):
    """Killed while it trains its first run: no process stays, its lock is stale, and the next start does the rest."""
    study, out, _ = whole
    other = tmp_path / "killed"
    process = subprocess.Popen(command(study, other), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 600
        while not list(other.glob("runs/*/train.jsonl")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        os.kill(process.pid, end)
        process.communicate(timeout=120)
    finally:
        process.kill()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive, [child.cmdline() for child in alive]
    assert process.returncode == (130 if end == signal.SIGTERM else -9)
    assert (other / ".study.lock").exists() == (end == signal.SIGKILL)
    assert not (other / "results.jsonl").exists()

    printed = run(study, other)
    assert ("was left by process" in printed) == (end == signal.SIGKILL)
    assert "training the base" not in printed
    assert measured(results(other)) == measured(results(out))


@pytest.mark.slow
def test_a_folder_that_another_study_writes_is_left_alone(whole):
    study, out, _ = whole
    holder = "import sys, time; from pathlib import Path; from qtarget_megatron import output_lock\n"
    holder += "output_lock.claim(Path(sys.argv[1]), 'it'); print('held', flush=True); time.sleep(600)"
    process = subprocess.Popen(
        [sys.executable, "-c", holder, str(out / ".study.lock")], stdout=subprocess.PIPE, cwd=REPOSITORY, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        assert f"study: error: {out} is being written by process {process.pid}" in run(study, out, code=2)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_run_that_fails_is_said_and_what_is_done_is_kept(whole, tmp_path):
    """One learning rate of two that finetune refuses: the other's run is there, and the same command goes on."""
    study = written(tmp_path / "fails.toml", **{"[1e-3]": "[1e-3, 1e-300]", "seeds = 1": "seeds = 1\n"})
    study.write_text(study.read_text().replace("no-pack = true", "no-pack = true\nlr-warmup-init = 1e-9"))
    printed = run(study, tmp_path / "out", code=1)
    (line,) = [line for line in printed.splitlines() if line.startswith("study: error: ")]
    assert "lr 1e-300" in line and "qtarget finetune ended with" in line and "(log: " in line
    assert {result["learning_rate"] for result in results(tmp_path / "out")} == {1e-3}


# ---- one training


@pytest.mark.slow
def test_a_shorter_training_is_the_beginning_of_the_whole_one(whole, tmp_path):
    """Its losses are those of the whole one's first steps, by the same schedule."""
    study_path, out, _ = whole
    study = read_study(written(tmp_path / "s.toml"))
    models = jobs.Models(out / "bases" / "tiny" / "base")
    condition = condition_of(study.data["clean"])
    logged = {}
    for steps in (2, 3):
        folder = tmp_path / str(steps)
        folder.mkdir()
        one = Run("tiny", "clean", "sft", 1e-3, 0, steps)
        train = condition.write_training(folder / "train.jsonl", study.arms["sft"], 16, 0)
        words = jobs.training_words(study, one, models, train, folder)
        done = subprocess.run(
            [sys.executable, "-m", "qtarget_megatron.finetune", *words], capture_output=True, timeout=600
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        logged[steps] = [
            (line["lm loss"], line["learning-rate"], line["grad-norm"]) for line in lines if "lm loss" in line
        ]
    assert len(logged[3]) == 3 and logged[2] == logged[3][:2]


@pytest.mark.slow
def test_measurements_against_a_loop_over_transformers_logits(whole):
    """nll, kl and p(y), one problem at a time, without padding."""
    import torch
    import transformers

    _, out, _ = whole
    base = out / "bases" / "tiny" / "base"
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    found = evaluate(base, base, Condition("table", wrong_rule=0.5))
    assert found.metrics["kl"] == pytest.approx(0, abs=1e-6)
    asked = [problem for problem, _ in zip(problems(TASKS["table"], "test", "evaluation"), range(200), strict=False)]
    total, count = 0.0, 0
    with torch.no_grad():
        for problem in asked:
            head = tokenizer(problem)["input_ids"]
            tail = [*tokenizer(TASKS["table"].solution(problem).text)["input_ids"], tokenizer.eos_token_id]
            log_p = model(torch.tensor([head + tail])).logits[0].double().log_softmax(-1)
            total -= sum(log_p[len(head) - 1 + place, token].item() for place, token in enumerate(tail))
            count += len(tail)
    assert found.metrics["nll"] == pytest.approx(total / count, rel=1e-5)
    # p(y) of the probe's characters: all are right or wrong, so that their mean is the whole one's.
    records = Condition("table", wrong_rule=0.5).demonstrations(200, "probe")
    sums = {True: [0.0, 0], False: [0.0, 0]}
    with torch.no_grad():
        for record in records:
            head = tokenizer(record["prompt"])["input_ids"]
            tail = [*tokenizer(record["completion"])["input_ids"], tokenizer.eos_token_id]
            p = model(torch.tensor([head + tail])).logits[0].double().softmax(-1)
            for place, token in enumerate(tail):
                wrong = any(begin <= place < end for begin, end in record["wrong"])
                sums[wrong][0] += p[len(head) - 1 + place, token].item()
                sums[wrong][1] += 1
    for wrong, name in ((True, "p wrong"), (False, "p right")):
        assert found.metrics[name] == pytest.approx(sums[wrong][0] / sums[wrong][1], rel=1e-5)
