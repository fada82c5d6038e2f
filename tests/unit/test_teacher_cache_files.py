"""The teacher cache's files: damage is found, an interrupted run is gone on with, and processes share them."""

import errno
import json
import os
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from cache_files import LENGTHS, TOKENIZER, contents, entries, header, read_all, write
from launching import REPOSITORY

from qtarget_megatron import output_lock
from qtarget_megatron.teacher_cache import CacheWriter, TeacherCache, writer


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(writer, "_PART_SAMPLES", 2)


# ---- damage


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_every_flipped_byte_of_a_part_is_found(tmp_path, top_p):
    head = header(4, top_p=top_p, vocab_size=1 << 17, k=2)
    write(tmp_path / "cache", head, LENGTHS[:4])
    (path,) = (tmp_path / "cache").glob("samples-*")
    data = path.read_bytes()
    for position in range(len(data)):
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(bytes([data[position] ^ 0x10]))
        with pytest.raises(ValueError, match="samples-0000000000.safetensors .*: restore it from a copy, or delete"):
            read_all(tmp_path / "cache")
        with open(path, "r+b") as file:
            file.seek(position)
            file.write(data[position : position + 1])
    read_all(tmp_path / "cache")


def test_damage_elsewhere_leaves_other_samples_readable(tmp_path):
    write(tmp_path / "cache", header())
    (path,) = (tmp_path / "cache").glob("samples-*")
    tails = TeacherCache(tmp_path / "cache").sample(5)[2].tobytes()
    data = path.read_bytes()
    assert data.count(tails) == 1
    path.write_bytes(data.replace(tails, bytes(len(tails))))
    cache = TeacherCache(tmp_path / "cache")
    cache.sample(1)
    with pytest.raises(ValueError, match="corrupt at sample 5: restore"):
        cache.sample(5)


@pytest.mark.parametrize("size", [-1, 0, 7, 100])
def test_a_truncated_part_is_found_on_opening(tmp_path, small_parts, size):
    write(tmp_path / "cache", header())
    path = tmp_path / "cache" / "samples-0000000002.safetensors"
    whole = path.stat().st_size
    os.truncate(path, size % whole)
    with pytest.raises(ValueError, match=f"0000000002.safetensors has {size % whole} bytes, expected {whole}: restore"):
        TeacherCache(tmp_path / "cache")
    path.unlink()
    with pytest.raises(ValueError, match="0000000002.safetensors is missing: restore"):
        TeacherCache(tmp_path / "cache")


def test_parts_of_another_cache_are_refused(tmp_path, small_parts):
    write(tmp_path / "cache", header())
    write(tmp_path / "other", header(data="e" * 64))
    name = "samples-0000000002.safetensors"
    (tmp_path / "cache" / name).write_bytes((tmp_path / "other" / name).read_bytes())
    cache = TeacherCache(tmp_path / "cache")  # the sizes are the same
    cache.sample(1)
    with pytest.raises(ValueError, match=f"{name} is not of this cache"):
        cache.sample(2)
    # The same cache, another part.
    (tmp_path / "cache" / name).write_bytes((tmp_path / "cache" / "samples-0000000000.safetensors").read_bytes())
    with pytest.raises(ValueError, match=f"{name} has|corrupt, or of another cache"):
        read_all(tmp_path / "cache")


@pytest.mark.parametrize(
    "change",
    [
        dict(k=3), dict(seq_length=64), dict(dtype="float32"), dict(vocab_size=301), dict(data="e" * 64),
        dict(num_samples=7), dict(num_samples=9), dict(parts=[]), dict(parts=None), dict(format="other"),
        dict(version=2), dict(k="4"), dict(k=0), dict(tokenizer="t"), dict(top_p=0.5),
    ],
)  # fmt: skip
def test_a_changed_index_is_refused(tmp_path, change):
    write(tmp_path / "cache", header())
    path = tmp_path / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="cache.json") as caught:
        read_all(tmp_path / "cache")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [None, b"", b"{", b"3", b"[]", b"{}", b"\xff"])
def test_foreign_directories_are_refused(tmp_path, index):
    folder = tmp_path / "folder"
    for directory in (folder, tmp_path / "absent"):
        with pytest.raises(
            ValueError,
            match="expected a directory that qtarget cache-teacher wrote, got no valid cache",
        ):
            TeacherCache(directory)
        folder.mkdir(exist_ok=True)
        if index is not None:
            (folder / "cache.json").write_bytes(index)


# ---- writing


def test_an_incomplete_cache_is_refused_with_what_is_there(tmp_path, small_parts):
    write(tmp_path / "cache", header(), upto=5)
    with pytest.raises(
        ValueError,
        match="is incomplete, with 4 of 8 samples: run qtarget cache-teacher again",
    ):
        TeacherCache(tmp_path / "cache")
    write(tmp_path / "cache", header())
    write(tmp_path / "at once", header())
    assert contents(tmp_path / "cache") == contents(tmp_path / "at once")


@pytest.mark.parametrize("call", ["fsync", "replace", "open"])
def test_a_run_that_fails_at_any_write_can_be_gone_on_with(tmp_path, small_parts, monkeypatch, call):
    write(tmp_path / "expected", header())
    original, calls = getattr(os, call), [0]
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fails_once(*args, **keywords):
        calls[0] += 1
        if calls[0] == failing:
            raise full
        return original(*args, **keywords)

    failing, failures = 0, 0
    while True:
        failing, calls[0] = failing + 1, 0
        directory = tmp_path / f"cache-{failing}"
        output_lock.claim(directory / writer.LOCK_FILE, "it")
        with monkeypatch.context() as patch:
            patch.setattr(writer.os, call, fails_once)
            try:
                write(directory, header())
            except ValueError as error:
                assert str(error) == f"{directory}: No space left on device; run again to go on from here"
                failures += 1
        output_lock.release_all()  # as at the end of the process
        if calls[0] < failing:
            break
        if not (directory / "cache.json").exists() or b'"complete": false' in (directory / "cache.json").read_bytes():
            with pytest.raises(ValueError, match="is incomplete|no valid cache.json"):
                TeacherCache(directory)
        write(directory, header())
        assert contents(directory) == contents(tmp_path / "expected")
    assert failures >= 6, "vocabulary, index, four parts, index"


def test_a_killed_run_goes_on_where_it_stopped(tmp_path):
    """The writer runs in a process of its own, which ends without warning as it begins the sixth part."""
    program = (
        "import sys; sys.path[:0] = ['tests/support']\n"
        "import cache_files as t, pathlib\n"
        "from fault_runs import AtOpen\n"
        "from qtarget_megatron.teacher_cache import writer\n"
        "writer._PART_SAMPLES = 2\n"
        "AtOpen(rank=0, text='samples-', number=6).begin()\n"
        "t.write(pathlib.Path(sys.argv[1]), t.header(600, k=200), [20] * 600)\n"
    )
    directory = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", program, str(directory)], cwd=REPOSITORY, timeout=400)
    assert done.returncode == -signal.SIGKILL
    with pytest.raises(ValueError, match=r"is incomplete, with \d+ of 600 samples") as caught:
        TeacherCache(directory)
    done = int(re.search(r"with (\d+) of", str(caught.value))[1])
    assert 8 <= done < 600
    head = header(600, k=200)
    again = CacheWriter(directory, head, TOKENIZER)
    assert not again.check() and again.open() == done
    again.append([None] * (600 - done))
    again.finish()
    cache = TeacherCache(directory)
    for index in (0, done - 1):
        np.testing.assert_array_equal(cache.sample(index)[0], entries(head, index, 20).ids)
    assert cache.num_tokens == 20 * done and len(cache.sample(done)[0]) == 0
    assert not list(directory.glob("*.new"))


def test_what_lies_behind_a_missing_part_is_written_anew(tmp_path, small_parts):
    write(tmp_path / "expected", header())
    write(tmp_path / "cache", header(), upto=7)
    (tmp_path / "cache" / "samples-0000000002.safetensors").unlink()
    (tmp_path / "cache" / "samples-0000000006.safetensors.new").write_text("half")
    write(tmp_path / "cache", header())
    assert contents(tmp_path / "cache") == contents(tmp_path / "expected")


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(data="e" * 64), "--data"),
        (dict(k=3, top_p=0.5), "--k, --top-p"),
        (dict(dtype="float32"), "--dtype"),
        (dict(seq_length=31), "--seq-length"),
        (dict(teacher_files="g"), "teacher"),
        (dict(teacher_checkpoint="c"), "--load"),
        (dict(precision="--bf16"), r"precision \(--bf16, --fp16\)"),
        (dict(chat_template="x"), "chat template"),
        (dict(tokenizer="x"), "tokenizer"),
    ],
)
def test_a_cache_of_other_inputs_is_not_gone_on_with(tmp_path, small_parts, complete, changes, named):
    write(tmp_path / "cache", header(), upto=None if complete else 4)
    before = contents(tmp_path / "cache")
    with pytest.raises(ValueError, match=f"holds a cache with a different {named}: choose another directory"):
        CacheWriter(tmp_path / "cache", header(**changes), TOKENIZER).check()
    assert contents(tmp_path / "cache") == before


def test_a_complete_cache_is_left_as_it_is(tmp_path):
    write(tmp_path / "cache", header())
    again = CacheWriter(tmp_path / "cache", header(teacher="moved to another folder"), TOKENIZER)
    assert again.check() is True
    (tmp_path / "cache" / "samples-0000000000.safetensors").unlink()
    with pytest.raises(ValueError, match="is missing"):
        again.check()


def test_places_that_cannot_hold_a_cache_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    for place, message in (
        ("none/cache", "there is no directory .*none: create it"),
        ("file", "is a file: expected a directory"),
        ("folder", "holds 'mine.txt' and no teacher cache"),
    ):
        with pytest.raises(ValueError, match=message):
            CacheWriter(tmp_path / place, header(), TOKENIZER).check()
    (tmp_path / "empty").mkdir()
    assert CacheWriter(tmp_path / "empty", header(), TOKENIZER).check() is False
    assert not list((tmp_path / "empty").iterdir())


# ---- processes


def test_a_cache_is_pickled_without_its_maps(tmp_path, small_parts):
    write(tmp_path / "cache", header())
    cache = TeacherCache(tmp_path / "cache")
    expected = cache.sample(5)
    data = pickle.dumps(cache)
    assert len(data) < 4000
    for found, wanted in zip(pickle.loads(data).sample(5), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


class _Samples(torch.utils.data.Dataset):
    def __init__(self, cache):
        self.cache = cache

    def __len__(self):
        return len(self.cache)

    def __getitem__(self, index):
        return index, *self.cache.sample(index)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_read_a_cache(tmp_path, small_parts, method):
    write(tmp_path / "cache", header())
    cache = TeacherCache(tmp_path / "cache")
    cache.sample(1)  # mapped before the workers start
    loader = torch.utils.data.DataLoader(
        _Samples(cache), batch_size=None, shuffle=True, num_workers=2, multiprocessing_context=method
    )
    seen = []
    for index, ids, log_p, tail in loader:
        seen.append(index)
        for found, wanted in zip((ids, log_p, tail), cache.sample(index), strict=True):
            np.testing.assert_array_equal(np.asarray(found), wanted)
    assert sorted(seen) == list(range(8))
