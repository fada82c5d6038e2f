"""--metrics-jsonl: what is logged, a line for each step; resumed, and beside TensorBoard."""

import json
import math

import pytest
from finetune_runs import run_all, write_data, write_models
from launching import run_ranks
from layout_runs import launch, pp

from qtarget_megatron.megatron.training.metrics import MetricsFile, check_metrics_file


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- the file


class Writer:
    def __init__(self):
        self.calls = []

    def add_scalar(self, *arguments):
        self.calls.append(arguments)

    def add_text(self, *arguments):
        self.calls.append(("text", *arguments))

    def flush(self):
        self.calls.append("flush")


def test_a_line_has_the_values_of_a_step(tmp_path):
    writer = Writer()
    file = MetricsFile(tmp_path / "metrics.jsonl", writer)
    for step in (1, 2):
        file.add_scalar("lm loss", step / 2, step)
        file.add_scalar("lm loss vs samples", step / 2, 8 * step)
        file.add_scalar("grad-norm", math.nan if step == 2 else 3, step)
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 1, "lm loss": 0.5, "grad-norm": 3.0}]
    file.flush()
    # An evaluation behind the last step.
    file.add_scalar("lm loss validation", 7, 2)
    file.flush()
    expected = {"step": 2, "lm loss": 1.0, "grad-norm": None, "lm loss validation": 7.0}
    assert lines(tmp_path / "metrics.jsonl")[1:] == [expected]
    file.add_text("a", "b")
    # TensorBoard is flushed where Megatron asks for it alone.
    assert len(writer.calls) == 7 + 2 + 1 and writer.calls[-1] == ("text", "a", "b")


def test_a_file_goes_on_behind_the_steps_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = "".join(json.dumps({"step": step, "a": 1.0}) + "\n" for step in (1, 2, 3, 4))
    for text, kept in ((whole, [1, 2]), (whole[:-25], [1, 2]), ("no JSON\n" + whole, []), ('{"step": 1', []), ("", [])):
        path.write_text(text)
        file = MetricsFile(path)
        file.add_scalar("a", 2, 3)
        file.flush()
        assert [line["step"] for line in lines(path)] == [*kept, 3]
        assert file.add_text("nobody", "reads it") is None


def test_a_file_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--metrics-jsonl .*: expected the name of a file, got a directory"):
        check_metrics_file(tmp_path)
    with pytest.raises(ValueError, match="there is no directory .*: create it"):
        check_metrics_file(tmp_path / "nowhere" / "metrics.jsonl")


# ---- trainings


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def words(workspace, *more):
    train = workspace / "train.jsonl"
    return ["--hf-model", workspace / "untied", "--sft-train", train, "--sft-valid", train, *more]


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_writes_what_tensorboard_gets(workspace):
    path = workspace / "metrics.jsonl"
    found = launch(2, {"run": words(workspace, *pp(2), "--metrics-jsonl", path)}, workspace, 120)["run"]["scalars"]
    written = lines(path)
    assert [line["step"] for line in written] == [1, 2, 3, 4]
    for tag in ("lm loss", "trust", "grad-norm", "learning-rate", "supervised tokens"):
        assert [line[tag] for line in written] == pytest.approx(found[tag], rel=1e-6)
    assert written[-1]["lm loss validation"] == pytest.approx(found["lm loss validation"][-1], rel=1e-6)
    assert not any(" vs samples" in key for line in written for key in line)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_training_that_resumes_goes_on_in_the_file(workspace):
    path = workspace / "resumed.jsonl"
    save = ["--save", workspace / "saved", "--save-interval", 2, "--metrics-jsonl", path]
    first = {"first": words(workspace, *save, "--exit-interval", 3)}
    again = {"again": words(workspace, *save, "--load", workspace / "saved", "--ckpt-step", 2)}
    for runs in (first, again):
        arguments = {name: [str(word) for word in run] for name, run in runs.items()}
        (results,) = run_ranks(1, run_all, (arguments, str(workspace)), 120, megatron=True)
        for result in results.values():
            assert result["code"] in (0, None), result["printed"][-2000:]
        if runs is first:
            assert [line["step"] for line in lines(path)] == [1, 2, 3]
    assert [line["step"] for line in lines(path)] == [1, 2, 3, 4]
