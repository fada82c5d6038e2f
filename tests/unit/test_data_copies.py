"""Data that are read by many, change, or need a copy: where that goes and when it is made."""

import concurrent.futures
import hashlib
import logging.handlers
import multiprocessing
import os
import pickle
import resource
import sys

import datasets
import numpy as np
import pytest
import torch
from data_files import JSON, PAIRS, many, without_null, write
from row_data import padded_rows
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.cache_folder import cache_folder
from qtarget_megatron.data import open_records
from qtarget_megatron.data.tables import TableFile, _opened

pytestmark = pytest.mark.usefixtures("caches")


# ---- while it is read


@pytest.mark.parametrize("kind", ["gzip", "parquet", "file", "saved", "folder"])
def test_a_source_that_changes_is_noticed(tmp_path, kind):
    path = tmp_path / "data"
    if kind == "folder":
        path.mkdir()
        write(path / "b", "parquet", PAIRS)
        write(path / "a", "parquet", PAIRS)
    else:
        write(path, kind, PAIRS)
    files = [open_records(path)]
    files.append(pickle.loads(pickle.dumps(files[0])))
    source = {"saved": path / "data-00001-of-00002.arrow", "folder": path / "b"}.get(kind, path)
    contents, last = source.read_bytes(), len(files[0]) - 1
    os.utime(source, (1, 1))  # touched
    assert [without_null(file.record(last)) for file in files] == [without_null(PAIRS[1])] * 2
    other = tmp_path / "other"
    other.write_bytes(contents[:-9] + bytes(9))
    os.replace(other, source)
    for file in files:
        for read in (file.record, file.text):
            with pytest.raises(
                ValueError, match=f"data file '{source}' changed: it has other contents of the same size"
            ):
                read(last)
    source.unlink()
    for file in files:
        with pytest.raises(ValueError, match=f"data file '{source}': No such file or directory"):
            file.record(last)
    if kind in ("saved", "folder"):  # that one alone
        assert files[0].record(0) == PAIRS[0]


@pytest.mark.parametrize("kind", ["gzip", "parquet"])
def test_other_contents_under_the_same_name_and_time_are_another_copy(tmp_path, kind):
    path = write(tmp_path / "data", kind, [{"prompt": "a", "completion": "b"}])
    os.utime(path, (1, 1))
    assert open_records(path).record(0)["prompt"] == "a"
    write(path, kind, [{"prompt": "c", "completion": "d" * 50}])
    os.utime(path, (1, 1))
    assert open_records(path).record(0)["prompt"] == "c"


def read_all(file, indices):
    return [file.record(i) for i in indices]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["gzip", "array", "parquet", "feather", "saved"])
def test_workers_read_ten_thousand_records_in_any_order(tmp_path, kind):
    records = many(10_000)
    file = open_records(write(tmp_path / "data", kind, records))
    assert len(pickle.dumps(file)) < 24 * len(records) + 10_000
    assert abs(file.num_bytes / len(JSON["array" if kind == "array" else "lines"](records)) - 1) < 0.1
    shares = np.array_split(np.random.default_rng(0).permutation(len(records)), 2)
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=fork) as workers:
        found = [workers.submit(read_all, file, share) for share in shares]
        for share, one in zip(shares, found, strict=True):
            assert one.result() == [records[i] for i in share]
    samples = padded_rows(file, byte_tokenizer(CHATML), 8, num_rows=64)
    batches = list(torch.utils.data.DataLoader(samples, batch_size=16, num_workers=2))
    assert torch.equal(batches[1]["tokens"][0], samples[16]["tokens"])


def opened(path):
    """In a process of its own."""
    file = open_records(path)
    return file.digest, read_all(file, range(0, len(file), 97))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("kind", ["parquet", "zstd"])
def test_processes_that_open_it_at_once_make_one_copy(tmp_path, kind, caches):
    records = many(5000)
    path = write(tmp_path / "data", kind, records)
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as workers:
        found = list(workers.map(opened, [path] * 3))
    assert found == [(hashlib.sha256(path.read_bytes()).hexdigest(), records[::97])] * 3
    copies = [file for file in caches.rglob("*") if file.is_file() and file.stat().st_size > 10_000]
    assert len(copies) == 1


# ---- where copies go


@pytest.mark.parametrize("kind", ["gzip", "parquet"])
def test_a_copy_is_made_once(tmp_path, kind, caches):
    path = write(tmp_path / "data", kind, many(3000))
    open_records(path)
    (copy,) = (file for file in caches.rglob("*") if file.is_file() and file.stat().st_size > 10_000)
    before = copy.stat()
    _opened.cache_clear()
    assert open_records(path).record(0) == many(1)[0]
    assert copy.stat().st_mtime_ns == before.st_mtime_ns and copy.stat().st_ino == before.st_ino


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    assert cache_folder("a") == tmp_path / "cache" / "a"
    monkeypatch.delenv("QTARGET_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder("a") == tmp_path / "xdg" / "qtarget_megatron" / "a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder("a") == tmp_path / "home" / ".cache" / "qtarget_megatron" / "a"
    monkeypatch.setenv("QTARGET_CACHE_DIR", "~/mine")
    assert cache_folder("a") == tmp_path / "home" / "mine" / "a"
    assert not list(tmp_path.iterdir())


def test_a_copy_that_was_deleted_is_made_again_or_named(tmp_path, caches, monkeypatch):
    path = write(tmp_path / "data", "parquet", PAIRS)
    open_records(path)
    (copy,) = caches.rglob("*.arrow")
    for file in copy.parent.iterdir():
        file.unlink()
    _opened.cache_clear()
    # the library has something to say of that
    logged = logging.handlers.BufferingHandler(10)
    monkeypatch.setattr(datasets.utils.logging.get_logger("datasets"), "handlers", [logged])
    assert open_records(path).record(0) == PAIRS[0] and logged.buffer == []
    copy.unlink()
    _opened.cache_clear()
    with pytest.raises(ValueError, match=f"data file '{path}': its Arrow copy lacks a file: delete .*{copy}"):
        open_records(path)


def test_copies_go_to_our_folder_or_the_librarys_own(tmp_path, monkeypatch, caches):
    path = write(tmp_path / "data", "parquet", PAIRS)
    open_records(path)
    assert list((caches / "datasets").rglob("*.arrow"))
    monkeypatch.delenv("QTARGET_CACHE_DIR")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "theirs")
    open_records(path)
    assert list((tmp_path / "theirs").rglob("*.arrow"))
    # what save_to_disk wrote needs none
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(tmp_path / "unused"))
    open_records(write(tmp_path / "saved", "saved", PAIRS))
    assert not (tmp_path / "unused").exists()


@pytest.mark.parametrize("kind", ["gzip", "parquet"])
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, kind, caches, capfd):
    path = write(tmp_path / "data", kind, many(3000))
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(tmp_path / "file"))
    ours = r"cannot be written to .*: {}: make room there, or name another folder by QTARGET_CACHE_DIR"
    with pytest.raises(ValueError, match=f"data file '{path}'.*" + ours.format("Not a directory")):
        open_records(path)
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(caches))
    # As a disk that is full: no file may grow further.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        with pytest.raises(ValueError, match=f"data file '{path}'.*" + ours.format("File too large")) as caught:
            open_records(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value) and capfd.readouterr() == ("", "")
    assert len(open_records(path)) == 3000  # with room again


@pytest.mark.parametrize(("terminal", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_progress_is_for_a_terminal_of_the_first_rank(tmp_path, monkeypatch, capfd, terminal, rank, shown):
    path = write(tmp_path / "data", "parquet", PAIRS)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("RANK", rank)
    level = datasets.utils.logging.get_verbosity()
    TableFile(path)
    out, err = capfd.readouterr()
    assert out == "" and bool(err) == shown
    assert not datasets.are_progress_bars_disabled() and datasets.utils.logging.get_verbosity() == level
