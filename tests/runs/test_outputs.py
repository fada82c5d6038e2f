"""What a training will write, before it starts: locks, folders, room, and an export that is complete already."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import pytest
import torch
from finetune_runs import COMMON, run_all, vocabulary, write_data, write_model
from launching import REPOSITORY, run_ranks

from qtarget_megatron import output_lock
from qtarget_megatron.huggingface import Architecture, copied_files
from qtarget_megatron.megatron.faults.resume_point import TRACKER
from qtarget_megatron.megatron.training import outputs
from qtarget_megatron.resumable import ResumableDirectory, ResumableLines
from qtarget_megatron.teacher_cache import CacheWriter


@pytest.fixture(autouse=True)
def nothing_is_held():
    yield
    output_lock.release_all()


def other_process(code: str) -> subprocess.Popen:
    """Runs code that prints a line when it is ready; the process waits for the end of its input then."""
    program = (
        f"import sys\nfrom pathlib import Path\n{textwrap.dedent(code)}\nprint('ready', flush=True)\nsys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def holder(path) -> subprocess.Popen:
    return other_process(f"from qtarget_megatron import output_lock\noutput_lock.claim(Path({str(path)!r}), 'it')")


def args_of(tmp_path, **changes):
    values = dict(save=str(tmp_path / "save"), save_hf=None, save_hf_dtype=None, skip_train=False, finetune=False)
    values |= dict(
        train_iters=100, train_samples=None, global_batch_size=8, save_interval=30, save_retain_interval=None
    )
    values |= dict(
        epochs=None, end=None, bf16=False, fp16=False, no_save_optim=None, optimizer="adam", sgd_momentum=0.9
    )
    values |= dict(use_precision_aware_optimizer=False, tensorboard_dir=None, wandb_project="", wandb_exp_name="")
    values |= dict(wandb_save_dir="", metrics_jsonl=None, lora_rank=None, lora_merge=False)
    return SimpleNamespace(**values | changes)


# ---- locks


def test_a_second_training_into_the_same_folder_is_refused_by_name(tmp_path):
    """The second of two is told who the first is, writes nothing, and may when the first has ended."""
    args = args_of(tmp_path)
    with holder(tmp_path / "save" / outputs.LOCK) as first:
        with pytest.raises(ValueError) as refused:
            outputs.reserve(args)
        text = str(refused.value)
        assert text.startswith(f"--save {args.save} is being written by process {first.pid} on ") and "\n" not in text
        assert time.strftime("%Y-%m-%d") in text
        first.stdin.close()
        first.wait(20)
    assert not (tmp_path / "save").exists()  # made for the lock, and empty
    outputs.reserve(args)
    outputs.reserve(args)  # what a process holds already it keeps
    assert json.loads((tmp_path / "save" / outputs.LOCK).read_text())["process"] == os.getpid()
    output_lock.release_all()
    assert not (tmp_path / "save").exists()


def test_a_lock_of_a_killed_process_is_taken_over_with_a_line(tmp_path, printed_log):
    args = args_of(tmp_path)
    with holder(tmp_path / "save" / outputs.LOCK) as first:
        first.send_signal(signal.SIGKILL)
        first.wait(20)
    assert (tmp_path / "save" / outputs.LOCK).exists()
    outputs.reserve(args)
    (line,) = printed_log.readouterr().out.splitlines()
    assert f"was left by process {first.pid} on " in line and "which has ended" in line


def test_a_process_that_was_forked_does_not_keep_the_lock(tmp_path):
    """A data worker that outlives its rank for a while must not keep the next start out."""
    code = f"""
        import os
        from qtarget_megatron import output_lock
        output_lock.claim(Path({str(tmp_path / "lock")!r}), "it")
        if os.fork() == 0:
            sys.stdin.read()
            os._exit(0)
    """
    first = other_process(code)
    first.kill()
    first.wait(20)
    output_lock.claim(tmp_path / "lock", "it")
    first.stdin.close()
    assert first.stdout.read() == ""  # at its end: the forked one lived until now
    first.stdout.close()


def test_a_process_that_was_forked_lets_no_lock_go(tmp_path):
    """As one does that ends in the ordinary way, where its exit handlers run."""
    output_lock.claim(tmp_path / "lock", "it")
    if (forked := os.fork()) == 0:
        output_lock.release_all()
        os._exit(0)
    assert os.waitpid(forked, 0)[1] == 0
    assert (tmp_path / "lock").exists()


@pytest.mark.parametrize("beats", [True, False])
def test_a_lock_of_another_host_counts_as_long_as_it_changes(tmp_path, monkeypatch, printed_log, beats):
    """No kernel lock reaches it there: its file is all that is seen of it."""
    monkeypatch.setattr(output_lock, "PATIENCE", 1.5)
    path = tmp_path / "lock"
    path.write_text(json.dumps({"host": "elsewhere", "process": 7, "since": "2026-01-01 00:00:00 +0000", "beat": 1}))
    if beats:
        code = f"""
            import threading, time
            def beat():
                for number in range(2, 1000):
                    text = '{{"host": "elsewhere", "process": 7, "since": "x", "beat": %d}}' % number
                    with open({str(path)!r}, "r+") as file:
                        file.write(text), file.truncate()
                    time.sleep(0.1)
            threading.Thread(target=beat, daemon=True).start()
        """
        with other_process(code) as other, pytest.raises(ValueError, match="process 7 on elsewhere.*gone for certain"):
            output_lock.claim(path, "--save x")
        assert other.returncode == 0 and path.exists()
    else:
        output_lock.claim(path, "--save x")
        waiting, taken = printed_log.readouterr().out.splitlines()
        assert "process 7 on elsewhere" in waiting and "waiting 1.5 s" in waiting
        assert "was left by process 7 on elsewhere" in taken


def test_a_file_system_without_locks_is_known_by_the_beat(tmp_path, monkeypatch):
    """The holder lives, and its number changes; then it is killed, and does not."""
    monkeypatch.setattr(output_lock, "PATIENCE", 1.5)
    path = tmp_path / "lock"
    code = f"""
        import errno, fcntl
        from qtarget_megatron import output_lock
        def lockf(*args):
            raise OSError(errno.ENOSYS, "no locks here")
        fcntl.lockf, output_lock.BEAT = lockf, 0.1
        output_lock.claim(Path({str(path)!r}), "it")
    """

    def lockf(*args):
        raise OSError(38, "no locks here")

    monkeypatch.setattr(output_lock.fcntl, "lockf", lockf)
    with other_process(code) as first:
        with pytest.raises(ValueError, match=f"process {first.pid} on "):
            output_lock.claim(path, "--save x")
        first.kill()
    output_lock.claim(path, "--save x")


def test_who_has_lost_the_lock_ends(tmp_path):
    """A host that stood still for longer than others wait must not go on writing."""
    path = tmp_path / "lock"
    code = f"""
        from qtarget_megatron import output_lock
        output_lock.BEAT = 0.1
        output_lock.claim(Path({str(path)!r}), "it")
    """
    with other_process(code) as first:
        time.sleep(0.3)
        assert first.poll() is None
        (tmp_path / "new").write_text('{"host": "elsewhere", "process": 7, "beat": 0}')
        os.replace(tmp_path / "new", path)
        assert first.wait(20) == 1
    assert json.loads(path.read_text())["process"] == 7


def test_what_the_tools_write_has_one_writer(tmp_path):
    """An export, scored records and a teacher cache; each may be written when the other process has ended."""
    cache = CacheWriter.__new__(CacheWriter)
    cache.directory, cache._lock = tmp_path / "cache", tmp_path / "cache" / ".lock"
    made = [ResumableDirectory(tmp_path / "out"), ResumableLines(tmp_path / "out.jsonl", {}), cache]
    code = "from qtarget_megatron import output_lock\n"
    code += "".join(f"output_lock.claim(Path({str(output._lock)!r}), 'it')\n" for output in made)
    with other_process(code) as first:
        for output in made:
            with pytest.raises(ValueError, match=f"process {first.pid} on "):
                output.open()
    for output in made:
        output.reserve()


# ---- folders


def unwritable(tmp_path, kind):
    """(a path that even root cannot write to, what is said of it)."""
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    return {
        "a file": (tmp_path / "file", "got a file"),
        "below a file": (tmp_path / "file" / "save", "Not a directory"),
        "the kernel's": ("/proc/save/deeper", "cannot be written: /proc/save: "),
        "a long name": (tmp_path / ("x" * 300), "File name too long"),
        "a link to itself": (tmp_path / "loop" / "save", "File exists"),
    }[kind]


@pytest.mark.parametrize("kind", ["a file", "below a file", "the kernel's", "a long name", "a link to itself"])
@pytest.mark.parametrize("flag", ["save", "tensorboard_dir", "save_hf"])
def test_folders_that_cannot_be_written_are_found_at_the_start(tmp_path, kind, flag):
    path, message = unwritable(tmp_path, kind)
    if flag == "save_hf" and kind in ("below a file", "the kernel's", "a link to itself"):
        message = "expected its parent to be a directory, found none"  # it is not made
    before = sorted(tmp_path.rglob("*"))
    args = args_of(tmp_path, **{"save": None, flag: str(path)})
    with pytest.raises(ValueError, match=message) as refused:
        outputs.reserve(args)
        outputs.check_board(args)
        if flag == "save_hf":
            directory = ResumableDirectory(path)
            directory.check()
            directory.reserve()
    named = str(path) if flag == "save_hf" else f"--{flag.replace('_', '-')} "
    assert named in str(refused.value) and "\n" not in str(refused.value)
    assert sorted(tmp_path.rglob("*")) == before


READ_ONLY = """
from types import SimpleNamespace
from pathlib import Path
import sys
from qtarget_megatron import output_lock
from qtarget_megatron.resumable import ResumableDirectory
for path in ("m/save", "m/new/save"):
    for action in (output_lock.claim, output_lock.probe):
        try:
            action(Path(path), "--save " + path)
        except ValueError as error:
            print(error)
try:
    ResumableDirectory("m/out").reserve()
except ValueError as error:
    print(error)
"""


def test_a_disk_that_is_mounted_read_only(tmp_path):
    (tmp_path / "m").mkdir()
    mount = f"mount -t tmpfs -o ro none m && exec {sys.executable} -c '{READ_ONLY}'"
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount]
    if subprocess.run([*command[:4], "true"], capture_output=True).returncode != 0:
        command = ["unshare", "--mount", "sh", "-c", mount]
        if subprocess.run([*command[:2], "true"], capture_output=True).returncode != 0:
            pytest.skip("needs a user or mount namespace")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    lines = result.stdout.splitlines()
    assert len(lines) == 5 and all("Read-only file system" in line for line in lines), result.stdout + result.stderr


def test_what_the_export_copies_is_looked_at_before_the_training(tmp_path):
    model, outside = tmp_path / "model", tmp_path / "outside.json"
    model.mkdir()
    outside.write_text("{}")
    for name in ("config.json", "tokenizer.json", "merges.txt", "model.safetensors.index.json", "weights.bin"):
        (model / name).write_text("{}")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "rag.jinja").write_text("x")
    assert list(map(str, copied_files(model))) == [
        "tokenizer.json",
        "merges.txt",
        "additional_chat_templates/rag.jinja",
    ]
    for name, target, message in (
        ("special_tokens_map.json", outside, "a link to .*outside.json, outside of it"),
        ("vocab.json", model / "gone.json", "No such file"),
        ("added_tokens.json", model / "added_tokens.json", "leads nowhere"),
    ):
        (model / name).symlink_to(target)
        with pytest.raises(ValueError, match=message):
            outputs.check_outputs(args_of(tmp_path, save=None, hf_model=model, save_hf=tmp_path / "out"), None, None)
        (model / name).unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "outside.json"]


# ---- room

CONFIG = dict(architectures=["LlamaForCausalLM"], vocab_size=131, hidden_size=48, intermediate_size=24)
CONFIG |= dict(num_hidden_layers=3, num_attention_heads=12)


def test_how_many_checkpoints_are_to_come(tmp_path):
    def count(iteration=0, **changes):
        return outputs.checkpoints_to_come(args_of(tmp_path, **changes), iteration)

    assert count() == 4  # 30, 60, 90, 100
    assert count(60) == 2 and count(90) == 1 and count(100) == 0
    assert count(save_interval=50) == 2 and count(save_interval=500) == 1
    assert count(train_iters=None, train_samples=800) == 4
    assert count(save_interval=10, save_retain_interval=50) == 3
    assert count(save=None) == 0 and count(skip_train=True) == 0


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({}, 12),
        ({"bf16": True}, 14),
        ({"bf16": True, "no_save_optim": True}, 2),
        ({"optimizer": "sgd"}, 8),
        ({"optimizer": "sgd", "sgd_momentum": 0.0}, 4),
        (dict(bf16=True, use_precision_aware_optimizer=True, main_params_dtype="fp16", exp_avg_dtype="fp8",
              exp_avg_sq_dtype="bf16"), 7),
    ],
)  # fmt: skip
def test_bytes_of_a_checkpoint(tmp_path, changes, each):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    arch = Architecture.from_hf(tmp_path)
    numbers = outputs.export_bytes(arch, torch.bfloat16) // 2
    assert outputs.checkpoint_bytes(args_of(tmp_path, **changes), arch) == each * numbers


def test_a_disk_that_is_too_small_is_refused_or_warned_of(tmp_path, monkeypatch):
    """Sizes are compared with what shutil.disk_usage says; of two outputs on one disk the sum."""
    save, out = (outputs.Item(flag, tmp_path, 10**9, n) for flag, n in (("--save", 3), ("--save-hf", 1)))

    def room(free, *items):
        monkeypatch.setattr(outputs.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
        return outputs.check_room(items)

    assert room(4 * 10**9, save, out) is None and room(10**9, out) is None and room(0) is None
    warning = room(4 * 10**9 - 1, save, out)
    assert "3 checkpoints of 1.0 GB are to come, there is room for 2" in warning and "--save-interval" in warning
    with pytest.raises(ValueError, match=r"1.0 GB for --save .* and 1.0 GB for --save-hf .*, found 2.0 GB free"):
        room(2 * 10**9 - 1, save, out)
    with pytest.raises(ValueError, match=r"1.0 GB for --save-hf .*, found 0.0 MB free"):
        room(0, out)


# ---- an export that is complete


def test_a_training_that_is_exported_is_done(tmp_path):
    out, save = tmp_path / "out", tmp_path / "save"
    for folder in (out, save):
        folder.mkdir()
    (save / TRACKER).write_text("100")
    (out / "config.json").write_text("{}")
    args = args_of(tmp_path, save_hf=out)
    assert not outputs.is_exported(args, 100)
    outputs.record_export(args, {"config.json": "digest"})
    assert outputs.is_exported(args, 100) and outputs.check_outputs(args, None, 100)
    for changes in (
        {"train_iters": 200},
        {"save_hf_dtype": "float32"},
        {"lora_merge": True},
        {"save_hf": save},
        {"save": str(out)},
        {"skip_train": True},
        {"finetune": True},
    ):
        assert not outputs.is_exported(SimpleNamespace(**vars(args) | changes), 100), changes
    assert not outputs.is_exported(args, 90) and not outputs.is_exported(args, None)
    (out / "more.txt").write_text("")
    assert not outputs.is_exported(args, 100)
    (out / "more.txt").unlink()
    (out / "config.json").write_text("{ }")
    assert not outputs.is_exported(args, 100)
    (out / "config.json").unlink()
    assert not outputs.is_exported(args, 100)


# ---- Weights & Biases


@pytest.mark.parametrize(
    ("changes", "pieces"),
    [
        ({"wandb_exp_name": ""}, ["--wandb-exp-name"]),
        ({"tensorboard_dir": None}, ["only what it writes to TensorBoard", "--tensorboard-dir DIR"]),
        ({"save": None}, ["--wandb-save-dir"]),
        ({"module": None}, ["pip install wandb"]),
        ({"module": SimpleNamespace(api=SimpleNamespace(api_key=None))}, ["wandb login", "WANDB_MODE=offline"]),
        ({"module": SimpleNamespace(api=SimpleNamespace(api_key="k"))}, []),
        ({"module": SimpleNamespace(), "mode": "offline"}, []),
    ],
)
def test_weights_and_biases_is_looked_at(tmp_path, monkeypatch, changes, pieces):
    changes = dict(changes)
    monkeypatch.setitem(sys.modules, "wandb", changes.pop("module", SimpleNamespace()))
    monkeypatch.setenv("WANDB_MODE", changes.pop("mode", "online"))
    given = dict(wandb_project="p", wandb_exp_name="e", tensorboard_dir=str(tmp_path / "board"))
    args = args_of(tmp_path, **given | changes)
    if not pieces:
        outputs.check_board(args)
        return
    with pytest.raises(ValueError) as refused:
        outputs.check_board(args)
    assert all(piece in str(refused.value) for piece in pieces), refused.value
    assert not (tmp_path / "board").exists()


# ---- in a training


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(folder, outcome of each run by name): of a Llama on one rank, the later ones after the first has ended well."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = dict(vocab_size=vocabulary(), max_position_embeddings=64, num_attention_heads=4, num_hidden_layers=2)
    write_model(folder / "wide", "Llama", sizes | dict(hidden_size=192, intermediate_size=512), torch.Generator())
    write_data(folder / "train.jsonl", 12, seed=1)
    words = [*COMMON, "--hf-model", folder / "wide", "--sft-train", folder / "train.jsonl", "--save-interval", 2]
    words += ["--save", folder / "save", "--load", folder / "save", "--save-hf", folder / "out"]
    half = ["--bf16", "--use-distributed-optimizer", "--save", folder / "half", "--load", folder / "half"]
    cases = {
        "first": words,
        "again": words,
        "another dtype": [*words, "--save-hf-dtype", "float16"],
        "half": [*words, *half, "--save-hf", folder / "half-out"],
    }
    return folder, run_ranks(1, run_all, (cases, str(folder), []), timeout=240, megatron=True)[0]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_training_that_is_complete_says_so_and_ends_well(runs):
    folder, outcomes = runs
    assert outcomes["first"]["code"] == 0, outcomes["first"]["printed"][-3000:]
    again = outcomes["again"]
    assert again["code"] == 0, again["printed"][-3000:]
    line = f"all 4 steps have been trained, and {folder / 'out'} holds the exported model: nothing is left to do"
    assert line in again["printed"] and "starting from" not in again["printed"]
    assert outcomes["another dtype"]["code"] == 2
    assert "expected a new or empty directory" in outcomes["another dtype"]["printed"]
    assert not list(folder.rglob("*.lock"))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(("save", "changes"), [("save", {}), ("half", {"bf16": True})])
def test_the_bytes_of_a_checkpoint_are_those_that_are_written(runs, tmp_path, save, changes):
    """What is not counted: names and shapes of some 60 tensors, in torch's own form, some 3 kB each."""
    folder, outcomes = runs
    assert outcomes["half"]["code"] == 0, outcomes["half"]["printed"][-3000:]
    written = sum(path.stat().st_size for path in (folder / save / "iter_0000004").glob("*.distcp"))
    counted = outputs.checkpoint_bytes(args_of(tmp_path, **changes), Architecture.from_hf(folder / "wide"))
    assert counted < written < 1.04 * counted, (counted, written)
    exported = (folder / ("out" if save == "save" else "half-out") / "model.safetensors").stat().st_size
    arch = Architecture.from_hf(folder / "wide")
    assert outputs.export_bytes(arch, arch.dtype) < exported < outputs.export_bytes(arch, arch.dtype) + 8_000
