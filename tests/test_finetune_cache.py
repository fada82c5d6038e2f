"""Fine-tuning from a cached teacher: with everything kept it is the live one, at every layout and micro-batch size."""

import json

import pytest
from finetune_runs import write_data, write_models
from launching import REPOSITORY, run_torchrun
from test_finetune import SEQUENCE_PARALLEL, assert_layouts, launch, pp, tp

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

SEQ_LENGTH = 32


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    vocabulary = json.loads((folder / "teacher" / "config.json").read_text())["vocab_size"]
    for name, k, layout in (("all", vocabulary, tp(2)), ("some", 64, pp(2))):
        words = ["--teacher-hf", folder / "teacher", "--data", folder / "train.jsonl", "--out", folder / name]
        words += ["--k", k, "--dtype", "float32", "--seq-length", SEQ_LENGTH, "--micro-batch-size", 3, *layout]
        done = run_torchrun(2, ["tools.cache_teacher", *words], timeout=200)
        assert done.returncode == 0, done.stdout[-3000:]
    assert (REPOSITORY / "tools" / "cache_teacher.py").exists()
    return folder


@pytest.fixture(scope="module")
def models(workspace):
    student = ["--hf-model", workspace / "untied", "--sft-train", workspace / "train.jsonl"]
    target = [*student, "--objective", "target-sft", "--objective-args", "eta=0.4"]
    kd, hot = [*student, "--objective", "kd"], ["--objective-args", "temperature=2"]
    live, every, some = (
        [flag, workspace / name]
        for flag, name in (("--teacher-hf", "teacher"), ("--teacher-cache", "all"), ("--teacher-cache", "some"))
    )
    return {
        "live target-sft": [*target, *live],
        "cached target-sft": [*target, *every],
        "cached target-sft whole": [*target, *every, "--qtarget-materialize-logits"],
        "live kd": [*kd, *hot, *live],
        "cached kd": [*kd, *hot, *every],
        **{f"some {rule}": [*target, *some, "--teacher-tail", rule] for rule in ("uniform", "student", "drop")},
    }


@pytest.fixture(scope="module")
def single(workspace, models):
    return launch(1, models, workspace, timeout=240)


def test_a_cache_of_everything_is_the_live_teacher(single):
    for name in ("target-sft", "kd", "target-sft whole"):
        live = single[f"live {name.split()[0]}"]["scalars"]["lm loss"]
        # float32 log-probabilities in place of logits: 1e-7 of up to 10 nats in each.
        assert single[f"cached {name}"]["scalars"]["lm loss"] == pytest.approx(live, rel=5e-6), name


def test_the_kept_tokens_leave_little_to_the_tails_rule(single):
    live = single["live target-sft"]["scalars"]["lm loss"]
    for rule in ("uniform", "student", "drop"):
        found = single[f"some {rule}"]["scalars"]["lm loss"]
        assert found != live and found == pytest.approx(live, rel=0.1), rule


def test_every_layout_reads_the_same_cache(workspace, models, single):
    two = {
        "cached target-sft at DP2, 4 a micro-batch": [*models["cached target-sft"], "--micro-batch-size", 4],
        "some student at TP2 with sequence parallelism": [*models["some student"], *tp(2), *SEQUENCE_PARALLEL],
        "some uniform at PP2": [*models["some uniform"], *pp(2)],
    }
    assert_layouts(launch(2, two, workspace, timeout=240), single)
    four = {
        "some drop at TP2PP2": [*models["some drop"], *tp(2), *pp(2)],
        "cached kd at TP4": [*models["cached kd"], *tp(4)],
    }
    assert_layouts(launch(4, four, workspace, timeout=240), single)
