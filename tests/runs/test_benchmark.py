"""tools/benchmark.py: figures that follow from what was measured, a report that is whole, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys

import numpy as np
import psutil
import pytest
import torch
from launching import REPOSITORY, run_ranks
from loss_definitions import target_sft
from matplotlib import image

from qtarget_megatron import objectives, qtarget_cross_entropy
from tools import benchmark
from tools.benchmarking import divergences, figures, growth, kernels, machine, measure, packing, peers, report, workers

TOOL = [sys.executable, str(REPOSITORY / "tools" / "benchmark.py")]
CPU = torch.device("cpu")
slow = pytest.mark.slow


# ---- figures


def test_the_floor_is_the_passes_at_the_speed_of_the_copy():
    """1 GB of logits, copied (read and written) in 0.5 s: 4 GB/s; three passes take 0.75 s, five 1.25 s."""
    copies = [0.4, 0.5, 9.0]
    assert figures.bandwidth(10**9, copies) == 4e9
    assert figures.floor_seconds(figures.PASSES, 10**9, copies) == pytest.approx(0.75)
    assert figures.floor_seconds(figures.PASSES_WITH_TEACHER, 10**9, copies) == pytest.approx(1.25)
    by_objective = {m.objective: m.passes for m in (kernels.Method(o, "", None) for o in ("sft", "dft", "target-sft"))}
    assert by_objective == {"sft": 3, "dft": 3, "target-sft": 5}


def test_quartiles_are_those_of_numpy():
    values = np.random.default_rng(0).exponential(size=11).tolist()
    found = figures.summary(values)
    assert [found["q1"], found["median"], found["q3"]] == pytest.approx(np.percentile(values, [25, 50, 75]))
    assert found["runs"] == 11
    assert figures.summary([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "runs": 1}


def test_a_ratio_pairs_runs_that_followed_each_other():
    """A moment that slows both down threefold moves neither the ratio nor its spread."""
    found = figures.ratio([2.0, 2.0, 6.0], [1.0, 1.0, 3.0])
    assert found == {"value": 2.0, "q1": 2.0, "q3": 2.0}
    with pytest.raises(ValueError):
        figures.ratio([1.0, 2.0], [1.0])


def test_a_line_is_found():
    assert figures.line([1, 2, 4, 8], [3 + 2 * x for x in (1, 2, 4, 8)]) == pytest.approx((3, 2, 0))
    x, y = [1.0, 2.0, 4.0, 9.0], [1.0, 2.5, 3.5, 10.0]
    fixed, slope, deviation = figures.line(x, y)
    # numpy weighs residuals, not their squares.
    assert (slope, fixed) == pytest.approx(tuple(np.polyfit(x, y, 1, w=1 / np.array(y))))
    assert deviation == pytest.approx(max(abs(fixed + slope * a - b) / b for a, b in zip(x, y, strict=True)))


# ---- measuring


def test_methods_take_turns_and_are_prepared_before_each_run():
    calls = []
    subjects = {
        name: measure.Subject(lambda name=name: calls.append(name), lambda name=name: calls.append(f"prepare {name}"))
        for name in "ab"
    }
    times = measure.alternate(subjects, device=CPU, seconds=0, min_rounds=3)
    assert calls == ["prepare a", "a", "prepare b", "b"] * 3
    assert {name: len(taken) for name, taken in times.items()} == {"a": 3, "b": 3}
    times = measure.alternate(subjects, device=CPU, seconds=60, min_rounds=1, max_rounds=4)
    assert len(times["a"]) == 4


def test_a_run_is_timed_without_its_preparation(monkeypatch):
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    subject = measure.Subject(lambda: take(1), lambda: take(100))
    assert measure.alternate({"": subject}, device=CPU, seconds=0, min_rounds=2)[""] == [1, 1]


def test_memory_is_what_the_allocator_held_beyond_inputs_and_results():
    # Each above 32 MiB, glibc's greatest mmap threshold: resident only while it is alive, whatever ran here before.
    given, size = torch.ones(1 << 24), 64 << 20

    def run():
        first = given + 1
        second = first + 1
        del first
        third = second * 2 + given  # second, a product and the sum
        return third

    used, result = measure.memory(measure.Subject(run), CPU)
    assert (used.peak, used.kept, used.extra) == (3 * size, size, 2 * size)
    assert torch.equal(result, torch.full_like(given, 7))
    if sys.platform == "linux":
        assert used.resident is None or 2.5 * size < used.resident < 4 * size


def test_in_place_needs_no_extra_memory():
    """What the report says of extra memory, on a shape where it can be said exactly."""
    logits = torch.randn(8, 1 << 14, requires_grad=True)
    labels = torch.arange(8)

    def extra(**options) -> float:
        def run():
            loss = qtarget_cross_entropy(logits, labels, objective=objectives.sft(), **options)
            return torch.autograd.grad(loss.sum(), logits)

        used, _ = measure.memory(measure.Subject(run), CPU)
        return used.extra / logits.nbytes, used.kept / logits.nbytes

    assert extra(inplace=False) == pytest.approx((0, 1), abs=0.01)
    assert extra(inplace=True) == pytest.approx((0, 0), abs=0.01)


def test_the_eager_peer_is_target_sft_as_defined():
    logits, teacher = torch.randn(2, 4, 9, dtype=torch.float64).unbind()
    labels = torch.tensor([0, 3, 8, 5])
    expected = target_sft(0.3)(logits, labels, teacher, {})
    # It computes in float32 itself.
    torch.testing.assert_close(peers.eager_target_sft(logits, teacher, labels, 0.3).double(), expected)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nothing_is_timed_that_computes_something_else(what):
    def wrong(logits, teacher, labels):
        loss = peers.torch_cross_entropy(logits, labels)
        return loss * 1.01 if what == "loss" else loss + (logits - logits.detach()).sum(-1) * 0.01

    def right(logits, teacher, labels):
        return peers.torch_cross_entropy(logits, labels)

    methods = [kernels.Method("sft", kernels.OURS, right), kernels.Method("sft", "other", wrong)]
    with pytest.raises(RuntimeError, match="other computes another sft than qtarget"):
        kernels.measure_shape(4, 50, torch.float32, CPU, methods, print, 0, 1)


# ---- processes


def answer(*, say, value):
    say("working")
    return [value, torch.get_num_threads(), torch.distributed.get_world_size()]


def fail(*, say):
    print("its last words")
    raise ValueError("no luck")


def hang(*, say):
    subprocess.run(["sleep", "600"])


def descendants() -> list[str]:
    lines = [" ".join(child.cmdline()) for child in psutil.Process().children(recursive=True)]
    # The tracker of shared resources is multiprocessing's own, and stays; so does the server that other files' ranks
    # were forked from.
    return [line for line in lines if "resource_tracker" not in line and "forkserver" not in line]


@slow
@pytest.mark.distributed
def test_a_worker_answers_with_its_own_threads():
    said = []
    found = workers.run("test_benchmark:answer", {"value": 5}, say=said.append, threads=2, ranks=2, timeout=120)
    assert (found, said) == ([[5, 2, 2]] * 2, ["working"])
    assert not descendants()


@slow
def test_a_failing_worker_is_reported_with_what_it_printed():
    with pytest.raises(workers.MeasurementFailed, match="its last words(.|\n)*ValueError: no luck"):
        workers.run("test_benchmark:fail", {}, say=print, timeout=120)


@slow
def test_a_worker_that_takes_too_long_is_ended_with_what_it_started():
    with pytest.raises(workers.MeasurementFailed, match="more than 5 s"):
        workers.run("test_benchmark:hang", {}, say=print, timeout=5)
    assert not descendants()


# ---- the command


def run(*words) -> int:
    return benchmark.main([str(word) for word in words])


def result(name: str, rows: list[dict], **changes) -> str:
    about = dict(date="2030-01-02T03:04+00:00", took=1.0, commit="c" * 40, dirty=False, machine={"CPU": "one"})
    about |= dict(load_average=0.0, cores=2, quick=True, benchmark=name, rows=rows) | changes
    return json.dumps(about)


COLLECTIVE = [
    {"ranks": 2, "tokens": 8, "method": method, "seconds": seconds, **figures.summary(seconds)}
    for method, seconds in {"ours": [1e-4, 2e-4, 3e-4], "theirs": [4e-4, 5e-4, 6e-4]}.items()
]


PARTS = "kernels divergences head collective step lora data growth convert cuda cuda-head".split()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["speed"],
            f"unknown part 'speed': expected {', '.join(PARTS)}, all or report",
        ),
        (["cuda"], "cuda needs an NVIDIA GPU"),
        (["report", "--out", "empty"], "holds no results to report"),
        (["report", "--out", "broken"], "kernels.json: expected results of this benchmark, got no JSON"),
        (["report", "--out", "other"], "kernels.json: expected results of kernels"),
        (["growth", "--out", "file"], "--out file: expected a directory, got a file"),
        (["growth", "--out", "quick"], "--out quick holds collective.json of a --quick run: give another directory"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, text in {
        "empty/other.txt": "",
        "broken/kernels.json": "{",
        "other/kernels.json": result("head", []),
        "file": "",
        "quick/collective.json": result("collective", COLLECTIVE),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"benchmark: error: .*{re.escape(message)}.*\n", captured.err)
    assert not list(tmp_path.rglob("REPORT.md"))


def test_help_teaches():
    done = subprocess.run([*TOOL, "--help"], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0
    for word in ("all", "--quick", "--out", *benchmark.PLANS):
        assert re.search(rf"^ *{re.escape(word)} ", done.stdout, re.MULTILINE), word
    assert re.search(r"^    python tools/benchmark.py report  ", done.stdout, re.MULTILINE)


@pytest.fixture
def instant(monkeypatch):
    """collective, measured in no time; the machine is idle."""
    monkeypatch.setitem(benchmark.PLANS, "collective", lambda say, quick: COLLECTIVE)
    monkeypatch.setattr(machine, "load_average", lambda: 0.1)


def test_a_busy_machine_is_warned_of_and_the_report_repeats_it(tmp_path, instant, monkeypatch, capsys):
    assert run("collective", "--out", tmp_path / "idle") == 0
    assert "WARNING" not in capsys.readouterr().err
    assert "busy" not in (tmp_path / "idle" / "REPORT.md").read_text()
    monkeypatch.setattr(machine, "load_average", lambda: 0.5 * machine.cores() + 0.1)
    assert run("collective", "--out", tmp_path / "busy") == 0
    assert "WARNING: the machine is busy" in capsys.readouterr().err
    assert "The machine was busy: no figures to quote." in (tmp_path / "busy" / "REPORT.md").read_text()


def test_a_failed_part_leaves_the_report_as_it_was(tmp_path, instant, monkeypatch, capsys):
    assert run("collective", "--out", tmp_path) == 0
    before = (tmp_path / "REPORT.md").read_text()

    def fails(say, quick):
        raise workers.MeasurementFailed("it died")

    monkeypatch.setitem(benchmark.PLANS, "growth", fails)
    assert run("collective", "growth", "--out", tmp_path) == 1
    assert "growth failed: it died" in capsys.readouterr().err
    assert (tmp_path / "REPORT.md").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["REPORT.md", "collective.json"]


def test_a_picture_that_cannot_be_drawn_leaves_no_half_of_a_report(tmp_path):
    (tmp_path / "collective.json").write_text(result("collective", COLLECTIVE))
    (tmp_path / "growth.json").write_text(result("growth", [{"series": "time by tokens"}]))
    with pytest.raises(KeyError):
        report.write(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["collective.json", "growth.json"]


def test_a_section_says_where_it_comes_from(tmp_path):
    (tmp_path / "collective.json").write_text(result("collective", COLLECTIVE, dirty=True, quick=False))
    other = dict(machine={"CPU": "another"}, date="2031-01-01T00:00+00:00", commit="d" * 40, load_average=0.99)
    step = {"variant": "sft", "tensor_parallel": 1, "threads": 1, "vocabulary": 8, "hidden": 4, "layers": 1}
    step |= {"seq_length": 8, "global_batch": 2, "steps": 3, "supervised": 0.6, "peak_gib": [0.5]}
    row = step | {"seconds": [0.5, 0.5], **figures.summary([0.5, 0.5])}
    (tmp_path / "step.json").write_text(result("step", [row], **other))
    report.write(tmp_path)
    found = sections((tmp_path / "REPORT.md").read_text())
    assert "| CPU | another |" in found["Benchmarks"]
    assert "2030-01-02 03:04 UTC at commit `cccccccccccc` with uncommitted changes" in found["Collectives"]
    assert "Not on the machine above, but: CPU: one." in found["Collectives"]
    assert "`dddddddddddd` in 1 s; load average before: 0.99. **Small shapes" in found["Training steps"]
    assert "| 1 | 1 | sft | 0.500 [0.500 to 0.500] | - | 32.0 | 0.50 | - | - |" in found["Training steps"]
    assert "Not measured (`python tools/benchmark.py kernels`)" in found["Kernels"]


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^##? (.+)$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# ---- a real run


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("benchmark")
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}
    out = folder / "out"
    words = [*TOOL, "kernels", "head", "--quick", "--out", str(out)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, done.stderr
    return out


@slow
def test_every_run_is_kept_and_is_a_time(measured):
    objectives_seen = {"": {"copy"}, "sft": {"torch", "Megatron"}, "dft": {"eager"}}
    objectives_seen["target-sft"] = {"eager", "torch.compile"}
    data = json.loads((measured / "kernels.json").read_text())
    assert data["quick"] and re.fullmatch("[0-9a-f]{40}|unknown", data["commit"])
    for objective, others in objectives_seen.items():
        ours = {kernels.OURS, kernels.OURS_IN_PLACE} if objective else set()
        assert {row["method"] for row in data["rows"] if row["objective"] == objective} == others | ours
    rows = data["rows"] + json.loads((measured / "head.json").read_text())["rows"]
    for row in rows:
        assert row["runs"] == len(row["seconds"]) >= 3
        assert all(0 < value < 60 for value in row["seconds"])
        assert row["median"] == statistics.median(row["seconds"])


@slow
def test_the_report_has_every_column_and_its_ratios_follow_from_the_runs(measured):
    """Recomputed from the JSON, by other code."""
    found = sections((measured / "REPORT.md").read_text())
    data = json.loads((measured / "kernels.json").read_text())["rows"]
    median = {(row["objective"], row["method"]): np.median(row["seconds"]) for row in data}
    head = "| objective | method | ms | times the floor | times qtarget | times qtarget, in place | extra memory |"
    lines = found["Kernels"].split(head)[1].strip().splitlines()[1:]
    assert len(lines) == len(data) - 1
    for line in lines:
        objective, method, taken, floor, ours, in_place, extra = (cell.strip() for cell in line.strip("|").split("|"))
        seconds = median[objective, method]
        passes = 5 if objective == "target-sft" else 3
        same(taken, seconds * 1e3)
        same(floor, seconds / (passes / 2 * median["", "copy"]))
        for cell, name in ((ours, "qtarget"), (in_place, "qtarget, in place")):
            if method == name:
                assert cell == "-"
            else:
                same(cell, seconds / median[objective, name])
        assert float(extra) >= 0
    assert float(next(line for line in lines if "| sft | torch |" in line).split("|")[-2]) == pytest.approx(2, abs=0.1)

    head = "| method | chunk | ms | times the fused head | extra MiB | allocated MiB | resident MiB |"
    data = json.loads((measured / "head.json").read_text())["rows"]
    shares = {(row["objective"], row["supervised"]) for row in data}
    assert shares == {("sft", 1.0), ("sft", 0.3), ("target-sft", 1.0), ("target-sft", 0.3)}
    assert found["Output layer and loss"].count(head) == len(shares)
    lines = [line for line in found["Output layer and loss"].splitlines() if re.match(r"\| (fused|whole) ", line)]
    assert len(lines) == len(data)
    for line, row in zip(lines, data, strict=True):
        first = next(r for r in data if (r["objective"], r["supervised"]) == (row["objective"], row["supervised"]))
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        same(cells[2], np.median(row["seconds"]) * 1e3)
        if row is not first:
            same(cells[3], np.median(row["seconds"]) / np.median(first["seconds"]))


def same(cell: str, value: float) -> None:
    assert float(cell.split(" ")[0]) == pytest.approx(value, rel=6e-3)


@slow
def test_pictures_show_something(measured):
    for name in ("kernels", "head"):
        picture = image.imread(measured / f"{name}.png")
        assert min(picture.shape[:2]) > 400 and picture[..., :3].std() > 0.05
    assert sorted(path.suffix for path in measured.iterdir()) == [".json", ".json", ".md", ".png", ".png"]


@slow
def test_a_partial_rerun_replaces_its_own_section_only(measured, tmp_path, monkeypatch):
    out = shutil.copytree(measured, tmp_path / "out")
    before = sections((out / "REPORT.md").read_text())
    assert before["Growth"].strip() == "Not measured (`python tools/benchmark.py growth`)."
    monkeypatch.setitem(benchmark.PLANS, "growth", lambda say, quick: grow(say))
    assert run("growth", "--quick", "--out", out) == 0
    after = sections((out / "REPORT.md").read_text())
    assert {name for name in after if after[name] != before[name]} <= {"Growth", "Benchmarks"}
    assert image.imread(out / "growth.png")[..., :3].std() > 0.05


def attentions():
    from tools.benchmarking.packing import measure_attention

    return measure_attention(say=lambda line: None, tokens=[32], heads=2, width=8, seconds=0, min_rounds=1)


def test_attention_is_measured_next_to_megatrons():
    """Both have computed the same before that."""
    (rows,) = run_ranks(1, attentions, megatron=True)
    assert sorted(row["attention"] for row in rows) == ["Megatron's", "ours"]


def adapted():
    from tools.benchmarking.lora import measure

    shape = dataclasses.replace(packing.SMALL, seq_length=32, steps=2)
    return measure(say=lambda line: None, shape=dataclasses.asdict(shape), rank=4)


def test_adapters_are_measured_next_to_all_weights():
    """Each way has computed what it should before that. The report's figures are recomputed by other code."""
    (rows,) = run_ranks(1, adapted, megatron=True)
    held = {(row["trained"], row["teacher"]): row["bytes"] for row in rows}
    seconds = {(row["trained"], row["teacher"]): row["seconds"] for row in rows}
    whole = {row["trained_numbers"] for row in rows if row["trained"] == "all weights"}
    factors = {row["trained_numbers"] for row in rows if row["trained"] == "LoRA"}
    # Two layers: q, k, v, o, gate, up and down, with the widths of each.
    assert factors == {2 * 4 * (128 + 96 + 96 + 128 + 3 * 192)}
    (model,), (adapters,) = whole, factors
    for (trained, teacher), found in held.items():
        number = adapters if trained == "LoRA" else model
        assert found["weights"] == 4 * (model + (adapters if trained == "LoRA" else 0))
        assert found["teacher"] == (4 * model if teacher == "a copy" else 0)
        assert found["gradients"] == pytest.approx(4 * number, abs=1024)
        assert found["optimizer"] == pytest.approx(8 * number, abs=1024)
        assert found["step"] > 0 and len(seconds[trained, teacher]) == 2

    first = "all weights", "a copy"
    lines = [line for line in report.lora(rows) if re.match(r"\| (all weights|LoRA) ", line)]
    assert len(lines) == len(rows) == 5
    for line in lines:
        trained, teacher, _, taken, ratio, *memory, peak, times = (cell.strip() for cell in line.strip("|").split("|"))
        found = held[trained, teacher]
        same(taken, np.median(seconds[trained, teacher]))
        for cell, part in zip(memory, ["weights", "teacher", "gradients", "optimizer", "step"], strict=True):
            same(cell, found[part] / 2**20)
        same(peak, sum(found.values()) / 2**20)
        if (trained, teacher) == first:
            assert ratio == times == "-"
        else:
            same(ratio, np.median(seconds[trained, teacher]) / np.median(seconds[first]))
            same(times, sum(found.values()) / sum(held[first].values()))


def test_divergences_are_measured_next_to_the_loss_as_one_would_write_it():
    """Both have computed the same before that. The report's ratios are recomputed by other code."""
    arguments = dict(tokens=24, vocabulary=512, dtype="float32", top_k=8, chunk_size=16, seconds=0, min_rounds=3)
    rows = divergences.measure(say=lambda line: None, **arguments)
    seconds = {(row["objective"], row["method"], row["teacher"]): np.array(row["seconds"]) for row in rows}
    assert len(seconds) == len(rows) == 16
    lines = [line for line in report.divergences(rows) if re.match(r"\| [a-z-]+ \| (qtarget|eager)", line)]
    assert len(lines) == len(rows) - 1  # all but the copy
    for line in lines:
        *key, taken, times_sft, times_kd, times_ours, _ = (cell.strip() for cell in line.strip("|").split("|"))
        own = seconds[tuple(key)]
        same(taken, np.median(own))
        for found, other in (
            (times_sft, ("sft", "qtarget", "none")),
            (times_kd, ("kd", "qtarget", "logits")),
            (times_ours, (key[0], "qtarget", key[2])),
        ):
            if other == tuple(key):
                assert found == "-"
            else:
                same(found, np.median(own) / np.median(seconds[other]))


def test_a_divergence_that_computes_something_else_is_not_timed(monkeypatch):
    monkeypatch.setitem(divergences.EAGER, "jsd", divergences._kd)
    arguments = dict(tokens=24, vocabulary=512, dtype="float32", top_k=8, chunk_size=16, seconds=0, min_rounds=1)
    with pytest.raises(RuntimeError, match="eager, in chunks computes another jsd than qtarget"):
        divergences.measure(say=lambda line: None, **arguments)


def test_costs_and_memory_follow_from_the_runs():
    rows = grow(print)
    lines = report.growth(rows)
    found = {}
    for line in lines:
        if line.startswith("| time by "):
            series, objective, *_, per_logit, _ = (cell.strip() for cell in line.strip("|").split("|"))
            found[series, objective] = float(per_logit)
    assert len(found) == 6

    def per_logit(series, objective):
        points: dict[float, float] = {}
        for row in rows:
            if (row["series"], row.get("objective")) == (series, objective):
                # Of the shards of one size the slowest counts.
                logits = row["tokens"] * row["vocabulary"] / row.get("shards", 1)
                points[logits] = max(points.get(logits, 0), np.median(row["seconds"]))
        assert len(points) == 3
        times = np.array(list(points.values()))
        return np.polyfit(list(points), times, 1, w=1 / times)[0] * 1e12

    for series, objective in found:
        assert found[series, objective] == pytest.approx(per_logit(series, objective), rel=6e-3)

    heads = lines.index("| method | 256 | 512 |")
    memory = {line.split("|")[1].strip(): float(line.split("|")[3]) for line in lines[heads + 2 :]}
    # float32 logits of 512 tokens and 4096 columns are 8 MiB; torch makes two more such matrices, the chunks are of 64.
    assert memory["whole logits, in place"] == pytest.approx(8, rel=0.15)
    assert memory["whole logits, torch"] > 15
    assert memory["fused head"] < 4


def grow(say) -> list[dict]:
    """growth on shapes so small that it needs no process of its own."""
    return growth.measure(
        say=say,
        tokens=[2, 4, 8],
        tokens_at=64,
        vocabularies=[32, 64, 128],
        vocabularies_at=4,
        shards=[1, 2, 4],
        shards_at=(4, 64),
        memory_tokens=[256, 512],
        memory_at=(8, 4096),
        chunk_size=64,
        seconds=0,
    )


@slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_the_old_report_and_no_process(tmp_path, how):
    out = tmp_path / "out"
    out.mkdir()
    (out / "collective.json").write_text(result("collective", COLLECTIVE))
    report.write(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    process = subprocess.Popen([*TOOL, "growth", "--quick", "--out", str(out)], stdout=subprocess.PIPE, text=True)
    started = []
    try:
        for line in process.stdout:
            if "time by tokens" in line:
                started = psutil.Process(process.pid).children(recursive=True)
                break
        process.send_signal(how)
        process.wait(400)
    finally:
        process.kill()
        process.stdout.close()
    assert started, "the measurement had no process of its own"
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}[how]
    _, alive = psutil.wait_procs(started, timeout=120)
    assert not alive
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
