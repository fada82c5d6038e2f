"""A study without its trainings: which there are, what follows from their results, and what is run on a cluster."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from launching import REPOSITORY
from study_runs import TINY, written

from examples.study import jobs
from examples.study.conditions import condition_of
from examples.study.findings import COOLER, EARLY, Findings
from examples.study.lm_eval import Harness
from examples.study.report import write_report
from examples.study.results import ResultsFile, pack, unpack
from examples.study.run import main
from examples.study.runs import Run, digest, learning_rate, number_of_runs, possible_runs
from examples.study.study_file import read_study

# ---- which runs there are


def early(steps: list[int]) -> str:
    """A grid of shorter trainings."""
    grid = '\n[[grids]]\nname = "early"\ndata = ["clean"]\nbases = ["tiny"]\narms = ["sft"]\n'
    return f"{grid}steps = {steps}\nseeds = 2\n"


SWEPT = {"learning_rates = [1e-3]": "learning_rates = [1e-4, 1e-3, 1e-2]", "seeds = 1": "seeds = 2"}


def test_finals_follow_the_sweep_at_the_rate_that_dev_prefers(tmp_path):
    study = read_study(written(tmp_path / "s.toml", **SWEPT))
    sweep = possible_runs(study, {})
    assert len(sweep) == 6 and {run.seed for run in sweep} == {0} and number_of_runs(study) == 8
    results = {run: {"metrics": {"dev": {1e-4: 0.2, 1e-3: 0.5, 1e-2: 0.5}[run.learning_rate]}} for run in sweep}
    # The smaller of equals.
    assert learning_rate(study, results, "tiny", "clean", "sft") == 1e-3
    more = [run for run in possible_runs(study, results) if run not in results]
    assert [(run.arm, run.learning_rate, run.seed) for run in more] == [
        ("sft", 1e-3, 1),
        ("target-sft 0.5", 1e-3, 1),
    ]
    partly = {run: result for run, result in results.items() if run.arm == "sft" or run.learning_rate < 1e-2}
    assert [run.arm for run in possible_runs(study, partly) if run.seed == 1] == ["sft"]


def test_the_number_of_runs_is_that_of_the_end(tmp_path):
    text = (
        TINY
        + '\n[[grids]]\nname = "early"\ndata = ["clean"]\nbases = ["tiny"]\narms = ["sft"]\nsteps = [0, 1]\nseeds = 2\n'
    )
    text += '\n[data.more]\ntask = "table"\nlearning_rates_from = "clean"\n'
    text += '\n[[grids]]\nname = "more"\ndata = ["more"]\nbases = ["tiny"]\narms = ["sft"]\nseeds = 2\n'
    for changes in ({}, SWEPT):
        study = read_study(written(tmp_path / "s.toml", text, **changes))
        done: dict = {}
        while new := [run for run in possible_runs(study, done) if run not in done]:
            done |= {run: {"metrics": {"dev": run.learning_rate}} for run in new}
        assert len(done) == number_of_runs(study)
        assert {run.learning_rate for run in done if run.data == "more"} == {max(study.learning_rates)}


def test_another_definition_is_another_run(tmp_path):
    study = read_study(written(tmp_path / "s.toml"))
    (one, _) = possible_runs(study, {})
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append(study, one, {"metrics": {"dev": 1.0}})
    assert list(file.read(study)) == [one]
    for change in (
        {"demonstrations = 16": "demonstrations = 17"},
        {"seq-length = 64": "seq-length = 32"},
        {'task = "table"': 'task = "sum"'},
        {"hidden_size = 32": "hidden_size = 64"},
    ):
        assert file.read(read_study(written(tmp_path / "other.toml", **change))) == {}
    # Names and order of grids, other arms and expectations change nothing.
    same = written(tmp_path / "same.toml", **{'name = "main"': 'name = "other"', '"tie"': '"sft"', "eta=0.5": "eta=1"})
    assert list(file.read(read_study(same))) == [one]
    assert digest(study, one) != digest(study, Run(**{**vars(one), "seed": 1}))


def test_a_line_that_is_no_json_is_named(tmp_path):
    study = read_study(written(tmp_path / "s.toml"))
    file = ResultsFile(tmp_path / "results.jsonl")
    file.append(study, possible_runs(study, {})[0], {})
    file.path.write_bytes(file.path.read_bytes() + b"{half\n")
    with pytest.raises(ValueError, match="results.jsonl, line 2: expected JSON: delete the line to run it again"):
        file.read(study)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps = 3\nlearning": "steps = 0\nlearning"}, "steps: expected 1 or more, got 0"),
        ({"[1e-3]": "[]"}, "learning_rates: expected different positive numbers"),
        ({"[1e-3]": "[1e-3, 1e-3]"}, "learning_rates: expected different positive numbers"),
        ({'arms = ["sft", ': 'arms = ["sfd", '}, "grid main: there is no [arms.sfd]"),
        ({'data = ["clean"]': 'data = ["dirty"]'}, "grid main: there is no [data.dirty]"),
        ({'objective = "sft"': 'objective = "sfd"'}, "sfd"),
        ({"eta=0.5": "beta=1"}, "beta"),
        ({'args = ["eta=0.5"]': 'teacher = "strong"'}, "grid main: [bases.tiny] has no strong model"),
        ({'args = ["eta=0.5"]': "keep = 0"}, "keep: expected a share above 0, at most 1, got 0"),
        ({'"tie"': '"nobody"'}, "[data.clean]: expected: there is no arm 'nobody'"),
        ({"workers = 2": "workers = 2\nspeed = 3"}, "study: unknown key 'speed': expected "),
        ({"steps = 3\n\n[data": "\n[data"}, "[bases.tiny]: expected steps, of its own training"),
        ({'task = "table"': 'task = "table"\nwrong_steps = 2'}, "[data.clean]: wrong_steps: expected a share"),
        ({'task = "table"': 'task = "table"\nwrong = 2'}, "[data.clean]: unknown key 'wrong' beside task"),
        ({"dev = 20": "dev = 0"}, "[data.clean]: dev: expected 1 problem or more, got 0"),
        ({'task = "table"': "wrong_steps = 0.5"}, "[data.clean]: expected task (a made-up one), source"),
        ({'objective = "sft"': 'objective = "weighted-sft"'}, '[arms.sft]: its weights are of a better model'),
        ({'objective = "sft"': 'objective = "cft"', 'task = "table"': 'source = "math"'}, "are critical is not known"),
        ({"title =": "title"}, "s.toml: Expected '=' after a key"),
    ],
)  # fmt: skip
def test_a_study_that_cannot_be_is_one_line(tmp_path, capsys, change, message):
    study = written(tmp_path / "s.toml", **change)
    assert main(["--study", str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("study: error: ") and message in line
    assert not (tmp_path / "out").exists()


# ---- what follows from results


def made_results(study, values: dict) -> dict:
    """Results of (arm, seed, steps) -> (dev, right of 4 problems greedy, sampled, sampled 0.5)."""
    found = {}
    for (arm, seed, steps), (dev, greedy, sampled, cooler) in values.items():
        outcomes = {"greedy": greedy, "sampled": sampled, "sampled 0.5": cooler}
        metrics = {name: sum(bits) / 4 for name, bits in outcomes.items()} | {"dev": dev, "nll": 1 - dev}
        found[Run("tiny", "clean", arm, 1e-3, seed, steps)] = {
            "metrics": metrics,
            "outcomes": {name: pack([bool(bit) for bit in bits]) for name, bits in outcomes.items()},
            "training": {"trust": 0.5},
            "seconds": {"train": 1.0},
            "machine": "m",
            "commit": "c",
        }
    return found


def test_arms_that_need_no_training_are_derived(tmp_path):
    text = TINY.replace("seeds = 1", "seeds = 2")
    text += early([0, 1, 2])
    study = read_study(written(tmp_path / "s.toml", text))
    none, all_right = [0, 0, 0, 0], [1, 1, 1, 1]
    made = made_results(
        study,
        {
            ("sft", 0, 1): (0.5, [1, 0, 0, 0], none, none),
            ("sft", 0, 2): (0.9, [1, 1, 0, 0], none, none),
            ("sft", 0, 3): (0.7, [1, 1, 1, 0], none, all_right),
            ("sft", 1, 1): (0.8, [0, 0, 0, 1], none, none),
            ("sft", 1, 2): (0.1, none, none, none),
            ("sft", 1, 3): (0.8, all_right, none, [1, 0, 0, 0]),
            ("target-sft 0.5", 0, 3): (0.7, all_right, all_right, none),
            ("target-sft 0.5", 1, 3): (0.7, all_right, all_right, none),
        },
    )
    findings = Findings(study, made)
    # Of equals the shorter; the base as it is, of 0 steps, is no training to stop.
    assert findings.values("tiny", "clean", EARLY, "greedy").tolist() == [0.5, 0.25]
    assert findings.values("tiny", "clean", COOLER, "sampled").tolist() == [1.0, 0.25]
    assert findings.values("tiny", "clean", COOLER, "greedy").tolist() == [0.75, 1.0]
    difference = findings.difference("tiny", "clean", "target-sft 0.5", "greedy")
    # Of the same seeds and problems: 1/4 in the first, 0 in the second.
    assert (
        difference.mean == pytest.approx(0.125)
        and findings.verdict("tiny", "clean", "target-sft 0.5", "greedy") == "tie"
    )
    assert findings.verdict("tiny", "clean", "target-sft 0.5", "sampled") == "win"
    # Less is better of nll: 0.3 against 0.3 and 0.2.
    assert findings.difference("tiny", "clean", "target-sft 0.5", "nll").mean == pytest.approx(0.05)
    assert findings.verdict("tiny", "clean", EARLY, "nll") == "tie"


def test_a_report_of_what_is_there_so_far(tmp_path):
    study_path = written(tmp_path / "tiny.toml")
    study = read_study(study_path)
    file = ResultsFile(tmp_path / "results.jsonl")
    write_report(study_path, tmp_path)
    assert "**0 of 2 runs so far**" in (tmp_path / "REPORT.md").read_text()
    right = [1, 1, 1, 0]
    for run, result in made_results(study, {("sft", 0, 3): (0.5, [1, 0, 0, 0], right, right)}).items():
        file.append(study, run, result)
    write_report(study_path, tmp_path)
    report = (tmp_path / "REPORT.md").read_text()
    assert "**1 of 2 runs so far**" in report and "| clean | tiny | sft | 0.001 | 25.0 |" in report
    assert "none yet" not in report.partition("## What was expected")[0]


# ---- a cluster


CLUSTER = REPOSITORY / "examples" / "study" / "cluster.toml"


def test_the_cluster_s_commands_are_torchrun_s_with_the_layout(tmp_path, capsys):
    words = ["--study", str(CLUSTER), "--out", str(tmp_path / "out"), "--dry-run"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("torchrun")]
    assert len(lines) == 5 and not (tmp_path / "out").exists()
    for line in lines:
        words = line.split()
        assert words[:6] == "torchrun --nproc-per-node 8 -m qtarget_megatron.finetune --hf-model".split()
        assert "--tensor-model-parallel-size 2 --sequence-parallel --use-distributed-optimizer" in line
        assert ("--teacher-hf" in words) == ("target-sft" in words)
        for flag in ("--save", "--load"):
            assert words[words.index(flag) + 1].endswith("checkpoint")
    assert "--teacher-hf " + str(CLUSTER.parent / "Qwen3-8B") in lines[-1]


def test_a_model_that_lies_elsewhere_is_the_same(tmp_path):
    found = []
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        study = read_study(Path(shutil.copy(CLUSTER, tmp_path / folder)))
        found.append([digest(study, one) for one in possible_runs(study, {})])
        study.data["ours"].condition["train"] = "train.jsonl"
        found.append([digest(study, one) for one in possible_runs(study, {})])
    assert found[1] == found[3]


@pytest.mark.parametrize("name", ["study", "quick", "real", "cluster"])
def test_every_study_file_s_commands_are_finetune_s(name, tmp_path):
    """Each flag is known to its parser, with a value that it takes."""
    from qtarget_megatron import finetune

    study = read_study(REPOSITORY / "examples" / "study" / f"{name}.toml")
    models = jobs.Models(tmp_path, tmp_path)
    for one in possible_runs(study, {}):
        words = jobs.training_words(study, one, models, tmp_path / "train.jsonl", tmp_path)
        known, _ = finetune.command_line().parse_known_args(words)
        assert known.objective == study.arms[one.arm].objective
    for data in study.data.values():
        condition_of(data)


FAKE_HARNESS = """
import json, sys
from pathlib import Path
words = dict(zip(sys.argv[1::1], sys.argv[2::1]))
out = Path(words["--output_path"]) / "model"
out.mkdir(parents=True)
drawn, seed = words["--gen_kwargs"], int(words["--seed"])
for task in words["--tasks"].split(","):
    with open(out / f"samples_{task}_2026-01-01.jsonl", "w") as file:
        for name, bonus in (("strict-match", 0), ("flexible-extract", 1)):
            # Not in the order of the problems.
            for doc in (2, 0, 1):
                right = doc < bonus + (seed == 1 if "temperature=1" in drawn else 1)
                file.write(json.dumps({"doc_id": doc, "filter": name, "exact_match": float(right)}) + "\\n")
    with open(out / f"samples_{task}_extra_2026-01-01.jsonl", "w") as file:
        file.write("{}\\n")
(out / "results_2026-01-01.json").write_text("{}")
"""


def test_the_harness_is_run_and_read(tmp_path):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE_HARNESS)
    harness = Harness(
        train="t", tasks=("gsm8k", "minerva"), dev_tasks=("ours",), filter="flexible-extract", repeats=2,
        command=f"{sys.executable} {fake}",
    )  # fmt: skip
    found = harness.evaluate(tmp_path / "model", tmp_path, (1.0,), tmp_path)
    # flexible-extract: greedy two of three; drawn with seed 1 two, with seed 2 one.
    assert found.metrics["greedy"] == pytest.approx(2 / 3) and found.metrics["dev greedy"] == pytest.approx(2 / 3)
    assert found.metrics["sampled"] == pytest.approx(1 / 2) and found.metrics["dev"] == pytest.approx(7 / 12)
    assert unpack(found.outcomes["greedy"]).tolist() == [1, 1, 0] * 2
    assert unpack(found.outcomes["sampled"]).tolist() == [1, 0.5, 0] * 2
    assert found.metrics["gsm8k sampled"] == pytest.approx(1 / 2)
    # What is there is not run again.
    fake.write_text("raise SystemExit(1)")
    assert harness.evaluate(tmp_path / "model", tmp_path, (1.0,), tmp_path).metrics == found.metrics
    with pytest.raises(ValueError, match=r"ended with 1 \(log: "):
        harness.evaluate(tmp_path / "model", tmp_path, (1.0,), tmp_path / "other")


def test_the_harness_s_command_line():
    harness = Harness(
        train="t", tasks=("gsm8k",), dev_tasks=("ours",), repeats=2, model_args={"tensor_parallel_size": 8},
        arguments=("--apply_chat_template",),
    )  # fmt: skip
    lines = harness.command_lines(Path("OUT"), (1.0, 0.5), Path("F"))
    assert list(lines) == ["greedy", "sampled-1", "sampled-2", "sampled 0.5-1", "sampled 0.5-2"]
    assert " ".join(lines["sampled-2"]) == (
        "lm_eval --model vllm --model_args pretrained=OUT,tensor_parallel_size=8,seed=2 --tasks ours,gsm8k "
        "--gen_kwargs temperature=1,do_sample=True --seed 2 --output_path F/sampled-2 --log_samples "
        "--apply_chat_template"
    )
    assert "temperature=0,do_sample=False" in lines["greedy"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tasks": ()}, "expected tasks and dev_tasks"),
        ({"dev_tasks": ("gsm8k",)}, "gsm8k is among tasks and dev_tasks"),
        ({"repeats": 0}, "repeats: expected 1 or more, got 0"),
    ],
)
def test_a_harness_that_cannot_be_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Harness(**{"train": "t", "tasks": ("gsm8k",), "dev_tasks": ("ours",), **values})


def test_several_filters_must_be_told_apart(tmp_path):
    fake = tmp_path / "fake.py"
    fake.write_text(FAKE_HARNESS)
    harness = Harness(train="t", tasks=("gsm8k",), dev_tasks=("ours",), command=f"{sys.executable} {fake}")
    with pytest.raises(ValueError, match="ours has the filters strict-match, flexible-extract: say which counts"):
        harness.evaluate(tmp_path / "model", tmp_path, (1.0,), tmp_path)


def test_flags_as_words():
    flags = {"lr": 1e-3, "bf16": True, "no-pack": False, "sft-train": ["a", "b"]}
    assert jobs.flag_words(flags) == ["--lr", "0.001", "--bf16", "--sft-train", "a", "b"]


def test_the_likeliest_records_are_kept_in_their_order(tmp_path):
    scored = tmp_path / "scored.jsonl"
    values = [[-1.0, -3.0], [-0.5], [], [-0.1, -0.2, -0.3], [-9.0]]
    scored.write_text("".join(json.dumps({"prompt": str(n), "old_log_prob": v}) + "\n" for n, v in enumerate(values)))
    out = jobs.keep_likeliest(scored, tmp_path / "kept.jsonl", 0.4)
    assert [json.loads(line) for line in out.read_text().splitlines()] == [{"prompt": "1"}, {"prompt": "3"}]
    assert len(jobs.keep_likeliest(scored, tmp_path / "kept.jsonl", 0.01).read_text().splitlines()) == 1


def test_help_explains_itself():
    printed = subprocess.run(
        [sys.executable, "-m", "examples.study.run", "--help"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout
    for word in ("--dry-run", "--keep-models", "--threads", "results.jsonl", "goes on"):
        assert word in textwrap.dedent(printed)
