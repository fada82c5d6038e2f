"""What may end a training: after each fault a second start goes on from the last complete checkpoint, bit for bit."""

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from fault_runs import AtOpen, Signal, curves, error_lines, launch, launch_many, launch_to_its_end, texts
from finetune_runs import COMMON, write_data, write_models
from launching import Launch
from layout_runs import tensors

from qtarget_megatron.megatron.faults.resume_point import TRACKER, find_damage, newest_complete, prepare_start

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# Steps, and steps between two checkpoints: the last one is written when training is done.
STEPS, INTERVAL = 22, 4
SEED = 20250


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def command(workspace, name, *more, steps=STEPS):
    words = ["--hf-model", workspace / "untied", "--sft-train", workspace / "train.jsonl", "--objective", "dft"]
    words += [
        "--tensor-model-parallel-size",
        2,
        "--micro-batch-size",
        8,
        "--train-iters",
        steps,
        "--save-interval",
        INTERVAL,
    ]
    words += ["--save", workspace / name, "--load", workspace / name, "--tensorboard-dir", workspace / f"board-{name}"]
    return texts([*COMMON, *words, *more])


@pytest.fixture(scope="module")
def undisturbed(workspace):
    launch(command(workspace, "whole", "--save-hf", workspace / "whole-hf"), workspace)
    return curves(workspace / "board-whole")


def assert_continued(workspace, name, undisturbed, reached):
    """The steps from reached on are the same; TensorBoard keeps the second of a step that was done twice."""
    for tag, values in curves(workspace / f"board-{name}").items():
        assert values[-(STEPS - reached) :] == undisturbed[tag][reached:], tag


def reached(workspace, name):
    """The iteration that the next start continues from; its files are all there."""
    iteration = int((workspace / name / TRACKER).read_text())
    assert find_damage(workspace / name / f"iter_{iteration:07d}") is None
    return iteration


def test_killed_at_random_moments_of_a_save_and_of_the_export(workspace, undisturbed):
    """In each save, Megatron opens a file of each rank's, .metadata, metadata.json and the tracker file."""
    draw, name = random.Random(SEED), "killed"
    moments = [
        Signal(1, step=draw.randrange(2, 4), later=draw.uniform(0, 0.05)),
        AtOpen(0, f"{name}/iter_0000004/", number=draw.randrange(1, 4)),
        AtOpen(draw.randrange(2), f"{name}/iter_0000008/__", later=draw.uniform(0, 0.003)),
        AtOpen(0, f"{name}/{TRACKER}"),
    ]
    print(f"seed {SEED}: {moments}")
    words = command(workspace, name)
    last = 0
    for moment in moments:
        launch_to_its_end(words, workspace, moment)
        if (workspace / name / TRACKER).exists():
            last = reached(workspace, name)
    assert last > 0
    # The next iteration was complete, but for the tracker file. It is not mixed with what is written now.
    launch_to_its_end([*words, "--save-hf", workspace / "killed-hf"], workspace, AtOpen(0, ".killed-hf.incomplete"))
    assert (workspace / name / f"iter_{last + INTERVAL:07d}.aside").is_dir()
    assert not (workspace / "killed-hf").exists()
    assert reached(workspace, name) == STEPS
    assert_continued(workspace, name, undisturbed, last)
    before = {path: path.stat().st_mtime_ns for path in (workspace / name).glob("iter_*/*")}
    launch([*words, "--save-hf", workspace / "killed-hf"], workspace)
    # The checkpoint that it starts from is not written over.
    assert before == {path: path.stat().st_mtime_ns for path in (workspace / name).glob("iter_*/*")}
    expected, found = tensors(workspace / "whole-hf"), tensors(workspace / "killed-hf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_sigterm_saves_and_a_killed_rank_is_told(workspace, undisturbed):
    """Under torchrun, which gets the signal. The next start continues, and has a rank killed; the third continues."""
    draw, name = random.Random(SEED), "signalled"
    print(f"seed {SEED}")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    out = workspace / "no-hf"
    words += ["qtarget_megatron.finetune", *command(workspace, name, "--num-workers", 1, "--save-hf", out)]
    with Launch(words) as launched:
        wait_for(lambda: (workspace / name / TRACKER).exists(), launched)
        time.sleep(draw.uniform(0, 0.4))
        launched.process.send_signal(signal.SIGTERM)
        ended = launched.wait(timeout=120)
    assert "exiting program after receiving SIGTERM" in ended.stdout
    first = reached(workspace, name)
    assert INTERVAL <= first < STEPS
    (line,) = [line for line in ended.stdout.splitlines() if line.startswith("finetune: ")]
    assert line == (
        f"finetune: ended by SIGTERM at step {first} of {STEPS}, saved as iteration {first} in {workspace / name}; "
        f"nothing was exported to {out}; the same command continues from iteration {first}"
    )

    with Launch(words) as launched:
        wait_for(lambda: f"iteration {first + 1:8d}/" in launched.output(), launched)
        time.sleep(draw.uniform(0, 0.1))
        victim = psutil.Process(rank_process(launched, 1))
        helpers = victim.children()
        victim.kill()
        ended = launched.wait(timeout=120)
    # The other rank has ended by itself: torchrun would kill one that still waits.
    assert ended.returncode != 0 and "forcefully exiting" not in ended.stdout
    # Its data worker: nothing outlives a killed rank.
    assert helpers and not psutil.wait_procs(helpers, timeout=120)[1]
    (line,) = error_lines(ended.stdout)
    assert "another rank has ended" in line
    second = reached(workspace, name)
    assert f"the same command continues from iteration {second}" in line
    assert first <= second < STEPS
    launch(command(workspace, name), workspace)
    assert_continued(workspace, name, undisturbed, second)


def wait_for(condition, launched):
    deadline = time.monotonic() + 800
    while not condition():
        assert launched.process.poll() is None and time.monotonic() < deadline, launched.output()[-4000:]
        time.sleep(0.01)


def rank_process(launched, rank):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(launched.process.pid)], capture_output=True, text=True)
    for pid in map(int, found.stdout.split()):
        with open(f"/proc/{pid}/environ") as file:
            if f"\0RANK={rank}\0" in f"\0{file.read()}":
                return pid
    raise AssertionError(f"rank {rank} not found")


FULL = {
    "one rank's part": (AtOpen(1, "/iter_0000008/", action="full", limit=100_000), 1),
    "what is written last": (AtOpen(0, "/iter_0000008/.metadata", action="full", limit=10_000), 0),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_stops_training_and_the_last_checkpoint_counts(workspace, undisturbed, what):
    happening, rank = FULL[what]
    name = f"full-{rank}"
    printed = launch_to_its_end(command(workspace, name), workspace, happening)
    (line,) = error_lines(printed)
    for piece in ("step 8: ", "could not be written", "the same command continues from iteration 4"):
        assert piece in line, line
    assert f"rank(s) {rank}" in line or "File too large" in line
    assert reached(workspace, name) == 4
    launch(command(workspace, name), workspace)
    assert_continued(workspace, name, undisturbed, 4)


def test_a_disk_that_is_full_for_the_tracker_file_needs_a_word(workspace, undisturbed):
    """Megatron empties the file before it writes. The refusal says how to go on, and so does the first line."""
    name = "full-tracker"
    printed = launch_to_its_end(
        command(workspace, name), workspace, AtOpen(0, f"{name}/{TRACKER}", number=2, action="full")
    )
    (line,) = error_lines(printed)
    assert "--ckpt-step 8 continues from iteration 8" in line
    words = command(workspace, name)
    cases = {"refused": (words, None), "continued": ([*words, "--ckpt-step", "8"], None)}
    results = launch_many(cases, workspace)
    assert [result["refused"]["code"] for result in results] == [2, 2]
    (line,) = error_lines(results[0]["refused"]["printed"])
    assert f"{TRACKER} is empty; iteration 8 is complete: give --ckpt-step 8 to continue from it" in line
    assert [result["continued"]["code"] for result in results] == [0, 0], results[0]["continued"]["printed"][-3000:]
    assert_continued(workspace, name, undisturbed, 8)


def test_a_full_disk_during_the_export_leaves_the_training(workspace, undisturbed):
    """The second start finds all steps done, and exports."""
    name, out = "full-export", workspace / "full-export-hf"
    words = command(workspace, name, "--save-hf", out)
    last_save = AtOpen(0, f"{name}/{TRACKER}", number=len(range(INTERVAL, STEPS, INTERVAL)) + 1)
    happening = dataclasses.replace(last_save, action="full", limit=100_000)
    (line,) = error_lines(launch_to_its_end(words, workspace, happening))
    assert "the export could not be written: " in line and "continues from iteration 22" in line
    assert not out.exists()
    launch(words, workspace)
    expected, found = tensors(workspace / "whole-hf"), tensors(out)
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


# ---- damaged files: prepare_start is what finetune asks before it trains


def remove(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def garbage(path):
    path.write_text("not this\n")


DAMAGE = {
    "part of a rank missing": ("__1_0.distcp", remove, "iter_0000022/__1_0.distcp is missing"),
    "part of a rank cut": ("__1_0.distcp", cut, "iter_0000022/__1_0.distcp has "),
    "part of a rank empty": ("__0_0.distcp", empty, "iter_0000022/__0_0.distcp has 0 bytes, "),
    ".metadata missing": (".metadata", remove, "iter_0000022/.metadata is missing"),
    ".metadata cut": (".metadata", cut, "iter_0000022/.metadata is damaged"),
    ".metadata empty": (".metadata", empty, "iter_0000022/.metadata is damaged"),
    ".metadata garbage": (".metadata", garbage, "iter_0000022/.metadata is damaged"),
    "metadata.json missing": ("metadata.json", remove, "iter_0000022/metadata.json is missing"),
    "metadata.json cut": ("metadata.json", cut, "iter_0000022/metadata.json is damaged"),
    "metadata.json empty": ("metadata.json", empty, "iter_0000022/metadata.json is damaged"),
    "iteration missing": (".", shutil.rmtree, "iter_0000022 is missing"),
    "tracker missing": (f"../{TRACKER}", remove, f"{TRACKER} is missing"),
    "tracker empty": (f"../{TRACKER}", empty, f"{TRACKER} is empty"),
    "tracker garbage": (f"../{TRACKER}", garbage, f"{TRACKER} names no iteration, but 'not this'"),
    "tracker of another iteration": (f"../{TRACKER}", lambda path: path.write_text("77"), "iter_0000077 is missing"),
}


@pytest.fixture
def saved(workspace, undisturbed, tmp_path):
    return shutil.copytree(workspace / "whole", tmp_path / "saved")


def arguments(saved, step=None, **changes):
    values = dict(load=str(saved), save=str(saved), ckpt_step=step, ckpt_format="torch_dist", finetune=False)
    return SimpleNamespace(**values | changes)


def test_a_complete_checkpoint_is_continued_from(saved):
    assert prepare_start(arguments(saved)).iteration == STEPS
    assert newest_complete(saved) == STEPS and newest_complete(saved, but=str(STEPS)) == 20
    assert prepare_start(arguments(saved, load=None)).iteration is None
    assert prepare_start(arguments(saved / "absent")).iteration is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_with_the_file_and_the_way_out(saved, kind):
    file, damage, message = DAMAGE[kind]
    damage(saved / "iter_0000022" / file)
    newest = STEPS if "tracker" in kind else 20
    with pytest.raises(ValueError) as refused:
        prepare_start(arguments(saved))
    assert "\n" not in str(refused.value)
    assert str(refused.value).startswith(f"--load {saved}: {message}")
    assert str(refused.value).endswith(
        f"; iteration {newest} is complete: give --ckpt-step {newest} to continue from it"
    )

    assert prepare_start(arguments(saved, newest)).iteration == newest
    assert (saved / TRACKER).read_text() == str(newest)
    # From now on it is what the directory holds: no flag is needed, and nothing newer can be taken for a checkpoint.
    assert prepare_start(arguments(saved)).iteration == newest
    assert newest_complete(saved) == newest


def test_damage_of_an_older_kind_of_checkpoint(saved):
    """What is in a file of its own there, common.pt, lies in .distcp files now."""
    folder = saved / "iter_0000022"
    metadata = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(metadata.replace(b"common_state", b"commen_state"))
    assert find_damage(folder) == "iter_0000022/common.pt is missing"
    torch.save({"args": 1}, folder / "common.pt")
    assert find_damage(folder) is None
    cut(folder / "common.pt")
    assert find_damage(folder) == "iter_0000022/common.pt is damaged"


def test_where_nothing_is_complete_the_refusal_says_so(saved):
    for folder in saved.glob("iter_*"):
        (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no other iteration is complete: restore the file, or start anew with"):
        prepare_start(arguments(saved))
    with pytest.raises(ValueError, match=r"iter_0000020/.metadata is missing; no other"):
        prepare_start(arguments(saved, 20))


def test_another_directory_is_read_and_not_changed(saved, tmp_path):
    before = sorted(path.name for path in saved.iterdir())
    assert prepare_start(arguments(saved, 8, save=str(tmp_path / "new"))).iteration == 8
    assert sorted(path.name for path in saved.iterdir()) == before and (saved / TRACKER).read_text() == str(STEPS)


def test_nothing_is_executed_to_look_at_a_checkpoint(saved):
    """The pickle would run a command; it is only read."""
    path = saved / "iter_0000022" / ".metadata"
    marker = saved / "executed"
    program = f"cposix\nsystem\n(S'touch {marker}'\ntR".encode()
    path.write_bytes(program + b"0" + path.read_bytes())
    assert find_damage(path.parent) in (None, "iter_0000022/.metadata is damaged")
    assert not marker.exists()


def test_finetune_refuses_damage_and_continues_from_the_iteration_it_names(workspace, undisturbed):
    shutil.copytree(workspace / "whole", workspace / "damaged")
    cut(workspace / "damaged" / "iter_0000022" / "__0_0.distcp")
    words = command(workspace, "damaged")
    cases = {"refused": (words, None), "continued": ([*words, "--ckpt-step", "20"], None)}
    results = launch_many(cases, workspace)
    assert [result["refused"]["code"] for result in results] == [2, 2]
    (line,) = error_lines(results[0]["refused"]["printed"])
    assert "__0_0.distcp has " in line and "--ckpt-step 20" in line
    assert "training ..." not in results[0]["refused"]["printed"]
    assert [result["continued"]["code"] for result in results] == [0, 0], results[0]["continued"]["printed"][-3000:]
    assert "was moved to iter_0000022.aside" in results[0]["continued"]["printed"]
    assert reached(workspace, "damaged") == STEPS
    assert_continued(workspace, "damaged", undisturbed, 20)
    assert json.loads((workspace / "damaged" / "iter_0000022" / "metadata.json").read_text())
