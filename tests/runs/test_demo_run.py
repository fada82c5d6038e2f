"""The demo's driver: process control, log, scalars, report, output folder; one run with adapters on a tiny model."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from finetune_runs import write_data, write_models

from examples.demo import prepare, report, run
from examples.demo.answers import HeldOutScore
from examples.demo.launch import LaunchFailed, MemoryPeaks, MemoryWatcher, launch, sigterm_as_interrupt

# ----------------------------------------------------------------------------------- processes


def script(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    return [sys.executable, "-u", str(path)]


def ended(pid: int, seconds: float = 120) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_launch_hands_on_each_line_and_keeps_the_log(tmp_path):
    lines = []
    launch(
        script(tmp_path, "import os\nprint('one')\nprint(os.environ['COLOUR'])"),
        env=dict(os.environ, COLOUR="blue"),
        log=tmp_path / "log",
        on_line=lines.append,
    )
    assert lines == ["one", "blue"]
    assert (tmp_path / "log").read_text() == "one\nblue\n"


def test_failure_shows_status_and_end_of_the_log(tmp_path):
    with pytest.raises(LaunchFailed, match=r"(?s)status 3.*line 99\n  \| the reason") as caught:
        launch(
            script(
                tmp_path,
                """
                import sys
                for number in range(100):
                    print("line", number)
                sys.exit(print("the reason", file=sys.stderr) or 3)
                """,
            ),
            env=os.environ,
            log=tmp_path / "log",
            on_line=lambda line: None,
        )
    assert "line 70\n" not in str(caught.value), "only the end of the log belongs on the screen"


def test_failure_shows_the_reason_and_not_what_torchrun_says_of_it(tmp_path):
    with pytest.raises(LaunchFailed) as caught:
        launch(
            script(
                tmp_path,
                """
                print("[rank0]: ValueError: the reason")
                print("W1 42 torch/distributed/elastic/multiprocessing/api.py:10] closing")
                for number in range(100):
                    print("time, host, exitcode", number)
                raise SystemExit(1)
                """,
            ),
            env=os.environ,
            log=tmp_path / "log",
            on_line=lambda line: None,
        )
    assert str(caught.value).endswith("the reason")
    assert "exitcode 99" in (tmp_path / "log").read_text()


def test_sigterm_cleans_up_like_an_interrupt():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_interrupt():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


LAUNCHER_WITH_TWO_RANKS = """
    import os, subprocess, sys
    code = "import time; block = bytearray({size}); block[::4096] = b'x' * len(block[::4096]); "
    code += "print('filled', flush=True); time.sleep({sleep})"
    ranks = [
        subprocess.Popen(
            [sys.executable, "-u", "-c", code.format(size=rank * 96 * 2**20, sleep=SLEEP)],
            env=dict(os.environ, RANK=str(rank)),
            start_new_session=True,
        )
        for rank in range(2)
    ]
    print("pids", *(rank.pid for rank in ranks))
    [rank.wait() for rank in ranks]
"""


def test_interrupt_ends_every_process_that_was_started(tmp_path):
    pids = []

    def interrupt(line):
        if line.startswith("pids"):
            pids.extend(int(word) for word in line.split()[1:])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(
            script(tmp_path, LAUNCHER_WITH_TWO_RANKS.replace("SLEEP", "120")),
            env=os.environ,
            log=tmp_path / "log",
            on_line=interrupt,
        )
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_ranks_that_outlive_their_killed_launcher_are_ended(tmp_path, monkeypatch):
    pids, sampled = [], threading.Event()
    sample = MemoryWatcher._sample

    def sample_and_tell(watcher):
        sample(watcher)
        if {process.pid for process in watcher.seen} >= set(pids) != set():
            sampled.set()

    monkeypatch.setattr(MemoryWatcher, "_sample", sample_and_tell)

    def kill_launcher(line):
        if line.startswith("pids"):
            pids.extend(int(word) for word in line.split()[1:])
            assert sampled.wait(120), "the watcher has not seen both ranks"
            psutil.Process(pids[0]).parent().kill()
            raise RuntimeError("as if reading the log had failed")

    with pytest.raises(RuntimeError):
        launch(
            script(tmp_path, LAUNCHER_WITH_TWO_RANKS.replace("SLEEP", "120")),
            env=os.environ,
            log=tmp_path / "log",
            on_line=kill_launcher,
            sample_seconds=0.05,
        )
    assert len(pids) == 2
    assert all(ended(pid) for pid in pids)


def test_peak_memory_is_told_per_rank(tmp_path, monkeypatch):
    """The ranks go on until they have been sampled with their memory filled."""
    ranks, filled = [], []
    sample = MemoryWatcher._sample

    def sample_and_end_the_ranks(watcher):
        complete = len(filled) == 2
        sample(watcher)
        while complete and ranks:
            os.kill(ranks.pop(), signal.SIGTERM)

    def on_line(line):
        if line.startswith("pids"):
            ranks.extend(int(word) for word in line.split()[1:])
        elif line == "filled":
            filled.append(line)

    monkeypatch.setattr(MemoryWatcher, "_sample", sample_and_end_the_ranks)
    peaks = launch(
        script(tmp_path, LAUNCHER_WITH_TWO_RANKS.replace("SLEEP", "600")),
        env=os.environ,
        log=tmp_path / "log",
        on_line=on_line,
        sample_seconds=0.05,
    )
    assert sorted(peaks.per_rank) == [0, 1]
    difference = peaks.per_rank[1] - peaks.per_rank[0]
    assert 90 * 2**20 < difference < 110 * 2**20
    assert peaks.together > 96 * 2**20


# -------------------------------------------------------------------------------------- report

STEP_LINE = (
    " [2026-01-02 03:04:05.678901] iteration {:8d}/{:8d} | consumed samples: {:12d} |"
    " elapsed time per iteration (ms): {:.1f} | learning rate: 5.000000E-05 |"
    " global batch size:    16 | lm loss: {:.6E} | trust: 6.000000E-01 | p(y): 6.000000E-01 |"
    " entropy: 1.100000E+00 | loss scale: 1.0 | grad norm: 2.345 |"
    " number of skipped iterations:   0 | number of nan iterations:   0 |"
)


def test_step_line_gives_every_number():
    parsed = report.parse_step_line(STEP_LINE.format(3, 12, 48, 12345.6, 0.987654))
    assert (parsed.step, parsed.num_steps) == (3, 12)
    assert parsed.seconds == pytest.approx(12.3456)
    assert parsed.values["lm loss"] == 0.987654
    assert parsed.values["p(y)"] == 0.6
    assert parsed.values["number of nan iterations"] == 0
    assert parsed.compact() == ("step   3/12  lm loss 0.9877  trust 0.6000  p(y) 0.6000  grad norm 2.3450  12.3 s")


def test_step_line_with_a_prefix_of_the_launcher_is_still_read():
    line = "[default5]:" + STEP_LINE.format(1, 2, 16, 10.0, 1.5)
    assert report.parse_step_line(line).values["lm loss"] == 1.5


@pytest.mark.parametrize(
    "line",
    [
        "",
        "  successfully saved checkpoint from iteration      12 to somewhere",
        " validation loss at iteration 6 | lm loss value: 1.0E+00 | lm loss PPL: 2.7E+00 | ",
        "training ...",
    ],
)
def test_other_lines_are_no_steps(line):
    assert report.parse_step_line(line) is None


def write_events(folder: Path, tags: dict[str, report.Series]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, series in tags.items():
            for number, value in series:
                writer.add_scalar(tag, value, number)


def synthetic_scalars() -> dict[str, report.Series]:
    scalars = {tag: [(1, 1.0), (2, 0.75), (3, 0.5)] for tag in report.TRAINING_TAGS}
    scalars[report.LOSS] = [(1, 2.0), (2, 1.5), (3, 1.25)]
    scalars["supervised tokens"], scalars["row fill"] = [(1, 700.0), (2, 500), (3, 600)], [(1, 0.95)] * 3
    scalars["lm loss validation"] = [(2, 1.75), (3, 1.625)]
    scalars["trust validation"] = [(2, 0.5), (3, 0.625)]
    return scalars


def test_scalars_are_read_back_in_order(tmp_path):
    write_events(tmp_path, synthetic_scalars())
    scalars = report.read_scalars(tmp_path)
    assert scalars["lm loss"] == [(1, 2.0), (2, 1.5), (3, 1.25)]
    assert scalars["lm loss validation"] == [(2, 1.75), (3, 1.625)]


def test_missing_scalar_is_named(tmp_path):
    scalars = synthetic_scalars()
    del scalars["trust"]
    write_events(tmp_path, scalars)
    with pytest.raises(ValueError, match="expected TensorBoard scalars trust, found"):
        report.read_scalars(tmp_path)


def test_step_evaluated_twice_counts_once(tmp_path):
    scalars = synthetic_scalars()
    scalars["trust validation"] += [(3, 0.625)]
    write_events(tmp_path, scalars)
    assert report.read_scalars(tmp_path)["trust validation"] == [(2, 0.5), (3, 0.625)]


def test_export_that_is_not_what_was_trained_is_an_error():
    scalars = {"p(y) validation": [(1, 0.1), (9, 0.6676)]}
    report.check_export(scalars, HeldOutScore(loss=1.0, trust=0.6678, num_tokens=9))
    with pytest.raises(ValueError, match="p\\(y\\) was 0.6676 .* finds 0.6334"):
        report.check_export(scalars, HeldOutScore(loss=1.0, trust=0.6334, num_tokens=9))


def synthetic_summary() -> dict:
    milliseconds = [9000, 2000, 4000]  # the first step warms up and must not count
    steps = [
        report.parse_step_line(STEP_LINE.format(number, 3, 16 * number, ms, 1.0))
        for number, ms in enumerate(milliseconds, 1)
    ]
    return report.summarise(
        synthetic_scalars(),
        steps,
        MemoryPeaks(per_rank={1: 2 * 2**30, 0: 2**30}, together=3 * 2**30),
        before=HeldOutScore(loss=1.5, trust=0.5, num_tokens=77),
        after=HeldOutScore(loss=1.25, trust=0.625, num_tokens=77),
    )


def test_summary_figures_by_hand():
    summary = synthetic_summary()
    assert summary["steps"] == 3
    assert summary["training"]["lm loss"]["first"] == 2.0
    assert summary["training"]["lm loss"]["last"] == 1.25
    assert summary["training"]["trust"]["mean"] == 0.75
    assert summary["step_seconds_median"] == 3.0
    assert summary["supervised_tokens_per_second"] == 200.0
    assert summary["training"]["row fill"]["mean"] == pytest.approx(0.95)
    assert summary["peak_memory_per_rank"] == [2**30, 2 * 2**30]
    assert summary["held_out_by_transformers"]["after"]["loss"] == 1.25
    assert json.loads(json.dumps(summary))["steps"] == 3


def test_table_shows_before_and_after():
    table = report.markdown_table(synthetic_summary())
    assert "| held-out -log p(y), by transformers, 77 tokens | 1.5000 | 1.2500 |" in table
    assert "after steps 2 and 3 | 1.7500 | 1.6250 |" in table
    assert "| peak resident memory of each rank, GiB | 1.00, 2.00 |" in table
    for block in table.strip().split("\n\n"):
        columns = {row.count("|") for row in block.splitlines()}
        assert len(columns) == 1, f"ragged table:\n{block}"


def test_a_run_without_steps_is_an_error():
    with pytest.raises(ValueError, match="no step"):
        report.summarise(
            synthetic_scalars(),
            [],
            MemoryPeaks(),
            HeldOutScore(1, 1, 1),
            HeldOutScore(1, 1, 1),
        )


def test_picture_has_three_drawn_panels(tmp_path):
    from matplotlib import image

    path = tmp_path / "curves.png"
    report.draw_curves(synthetic_scalars(), "title", path)
    pixels = image.imread(path)[..., :3]
    height, width, _ = pixels.shape
    assert (height, width) == (480, 1560)
    coloured = pixels.max(-1) - pixels.min(-1) > 0.3
    for panel in range(3):
        left = panel * width // 3
        assert coloured[:, left : left + width // 3].sum() > 200, f"panel {panel} has no curve"


def test_report_files_hold_the_figures_and_the_answers(tmp_path):
    answers = report.markdown_answers("1+1?", "2\n#### 2", "three", "2")
    report.write_report(tmp_path, synthetic_summary(), answers)
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 3
    text = (tmp_path / "report.md").read_text()
    assert "**Answer before**\n\n    three" in text and "    #### 2" in text


# ---------------------------------------------------------------------------------- the driver


def test_failed_run_keeps_the_earlier_output_and_its_own_log(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.json").write_text("earlier")
    with pytest.raises(LaunchFailed), run.finished_output(out) as work:
        (work / "train.log").write_text("what went wrong")
        (work / "checkpoint").mkdir()
        raise LaunchFailed("training")
    assert (out / "report.json").read_text() == "earlier"
    assert (tmp_path / "out-failed.log").read_text() == "what went wrong"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out-failed.log"}


def test_successful_run_replaces_the_earlier_output_whole(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").touch()
    with run.finished_output(out) as work:
        (work / "report.json").write_text("new")
    assert [path.name for path in out.iterdir()] == ["report.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_no_demo_made_is_not_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ValueError, match="not an earlier demo's output"):
        run.check_out(tmp_path / "thesis")


def test_a_disk_that_is_too_small_is_refused_before_anything_is_downloaded(tmp_path, monkeypatch):
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert run.PARAMETERS == 49152 * 576 + 30 * layer + 576
    monkeypatch.setattr(run, "prepare", lambda cache: pytest.fail("downloaded"))
    cache, settings = tmp_path / "none" / "cache", run.Settings(out=tmp_path / "out")

    def disk(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    disk(20 * run.PARAMETERS - 1)
    with pytest.raises(ValueError, match="2.2 GB for --out .* and 538.1 MB|2.2 GB for --out .* and 0.5 GB"):
        run.run(settings, cache)
    assert list(tmp_path.iterdir()) == []
    disk(20 * run.PARAMETERS)
    run.check_room(settings, cache)
    # Where the model is there already.
    (cache / prepare.MODEL_FOLDER).mkdir(parents=True)
    disk(16 * run.PARAMETERS)
    run.check_room(settings, cache)
    # A checkpoint of adapters is small.
    disk(4 * run.PARAMETERS)
    run.check_room(replace(settings, lora=True), cache)


def test_parameters_of_the_default_objective_do_not_leak_to_others():
    assert run.parse_arguments([])[0].objective_args == ["eta=0.5"]
    assert run.parse_arguments(["--objective", "dft"])[0].objective_args == []
    chosen, _ = run.parse_arguments(["--objective", "beyond_log", "--objective-args", "alpha=2"])
    assert chosen.objective_args == ["alpha=2"]


def test_adapters_have_a_learning_rate_of_their_own():
    rates = {flags: run.parse_arguments(flags.split())[0].learning_rate for flags in ("", "--lora")}
    assert rates["--lora"] > rates[""]
    assert run.parse_arguments(["--lora", "--learning-rate", "0.01"])[0].learning_rate == 0.01


def test_finetune_command_asks_for_six_ranks_and_only_known_paths(tmp_path):
    prepared = prepare.Prepared(tmp_path / "model", tmp_path / "t.jsonl", tmp_path / "v.jsonl")
    settings = run.Settings(out=tmp_path / "out", objective="dft", objective_args=[])
    command = run.finetune_command(settings, prepared, tmp_path / "unfinished")
    words = " ".join(command)
    assert "--nproc-per-node 6 -m qtarget_megatron.finetune" in words
    assert "--tensor-model-parallel-size 3 --pipeline-model-parallel-size 2" in words
    assert "--objective-args" not in command and "--teacher-hf" not in command
    guided = run.finetune_command(run.Settings(out=tmp_path / "out"), prepared, tmp_path / "unfinished")
    assert guided[guided.index("--teacher-hf") + 1] == str(prepared.model)
    assert re.search(rf"--save-hf {tmp_path}/unfinished/model\b", words)


def test_the_teacher_of_adapters_is_no_second_model(tmp_path):
    prepared = prepare.Prepared(tmp_path / "model", tmp_path / "t.jsonl", tmp_path / "v.jsonl")
    guided = run.Settings(out=tmp_path / "out", lora=True)
    command = run.finetune_command(guided, prepared, tmp_path / "unfinished")
    assert {"--lora-rank", "--lora-merge", "--teacher-self"} <= set(command) and "--teacher-hf" not in command
    alone = run.finetune_command(replace(guided, objective="dft", objective_args=[]), prepared, tmp_path / "unfinished")
    assert "--lora-rank" in alone and "--teacher-self" not in alone


@pytest.mark.slow
@pytest.mark.distributed
def test_adapters_are_trained_and_the_exported_model_has_them(tmp_path, monkeypatch):
    """A whole run with --lora on two ranks: transformers finds in model/ the p(y) that training ended with."""
    write_models(tmp_path)
    for name, count in (("train.jsonl", 30), ("valid.jsonl", 8)):
        write_data(tmp_path / name, count, seed=count)
    tiny = prepare.Prepared(tmp_path / "untied", tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    monkeypatch.setattr(run, "prepare", lambda cache: tiny)
    monkeypatch.setattr(run, "TENSOR_PARALLEL", 1)
    monkeypatch.setattr(run, "check_room", lambda settings, cache: None)
    chosen = dict(objective="sft-kl", objective_args=["lam=0.1"], steps=20, seq_length=64, learning_rate=0.01)
    run.run(run.Settings(tmp_path / "out", lora=True, **chosen), tmp_path / "cache")
    summary = json.loads((tmp_path / "out" / "report.json").read_text())
    before, after = (summary["held_out_by_transformers"][key]["trust"] for key in ("before", "after"))
    # More than the tolerance of the comparison that the run has made.
    assert after > before + 10 * report.EXPORT_TOLERANCE


def test_training_ranks_get_one_thread_and_no_gpu():
    env = run.training_environment()
    assert env["OMP_NUM_THREADS"] == "1" and env["CUDA_VISIBLE_DEVICES"] == ""


def test_warm_up_is_shorter_than_the_run(tmp_path):
    prepared = prepare.Prepared(tmp_path / "model", tmp_path / "t.jsonl", tmp_path / "v.jsonl")
    for steps in (1, 2, 3, 12):
        settings = run.Settings(out=tmp_path / "out", steps=steps)
        command = run.finetune_command(settings, prepared, tmp_path / "unfinished")
        assert int(command[command.index("--lr-warmup-iters") + 1]) < steps


@pytest.mark.parametrize("module", ["run", "prepare"])
def test_help_imports_nothing_heavy(module):
    code = f"""
import runpy, sys
sys.argv = ["demo", "--help"]
try:
    runpy.run_module("examples.demo.{module}", run_name="__main__")
finally:
    print("heavy:", sorted({{"torch", "transformers", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=800,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert "--cache" in done.stdout
    assert "heavy: []" in done.stdout
