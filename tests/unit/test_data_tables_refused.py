"""Data that are not read: what is said of them."""

import gzip
import logging.handlers
import os
import socket
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import PAIRS, TABLES, write, write_stream

from qtarget_megatron.data import open_records

pytestmark = pytest.mark.usefixtures("caches")


def table(**columns):
    """Two records with further columns."""
    return pyarrow.table({"prompt": ["a", "b"], "completion": ["c", "d"], **columns})


DAY = pyarrow.array([0, 1], pyarrow.timestamp("us"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"day": DAY}, r'column "day": expected text.*got timestamp\[us\], which JSON does not have: leave'),
        ({"a": [b"x", b"y"]}, 'column "a": .*got binary'),
        ({"a": pyarrow.StructArray.from_arrays([DAY], ["b"])}, 'column "a.b": .*timestamp'),
        ({"a": pyarrow.array([[], None], pyarrow.list_(pyarrow.date32()))}, r'column "a": .*date32\[day\]'),
        ({"a": pyarrow.array([1, 2], pyarrow.decimal128(5))}, r'column "a": .*decimal128\(5, 0\)'),
    ],
    ids=["timestamp", "binary", "nested", "list", "decimal"],
)
@pytest.mark.parametrize("kind", ["parquet", "stream", "saved"])
def test_values_that_json_does_not_have_are_named_with_their_column(tmp_path, kind, columns, message):
    path = tmp_path / "data"
    TABLES[kind](table(**columns), path)
    with pytest.raises(ValueError, match=f"data file '{path}.*{message}") as caught:
        open_records(path)
    assert "\n" not in str(caught.value)


def test_types_that_the_library_does_not_have_are_named_with_their_column(tmp_path):
    pyarrow.parquet.write_table(table(a=pyarrow.array([None] * 2, pyarrow.map_("string", "int64"))), tmp_path / "data")
    with pytest.raises(ValueError, match='column "a": expected text.* got map<string, int64'):
        open_records(tmp_path / "data")


def test_two_columns_of_one_name_are_refused(tmp_path):
    twice = pyarrow.table([["a"], ["b"], ["c"]], names=["prompt", "completion", "prompt"])
    pyarrow.parquet.write_table(twice, tmp_path / "data")
    with pytest.raises(ValueError, match='has two columns "prompt": rename one'):
        open_records(tmp_path / "data")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"weight": [1.0, float("nan")]}, 'column "weight": expected a finite number, got nan'),
        ({"a": [[{"b": 1.0}], [{"b": float("inf")}]]}, 'column "a.b": expected a finite number, got inf'),
        ({"a": pyarrow.array(["1", "{"]).cast(pyarrow.json_())}, 'column "a": expected JSON text, got '),
        ({"a": pyarrow.array(["1", "[" * 100_000]).cast(pyarrow.json_())}, "nested too deep"),
    ],
    ids=["nan", "infinity", "json", "deep"],
)
def test_a_bad_value_is_named_with_its_record(tmp_path, columns, message):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table(**columns), path)
    file = open_records(path)
    file.record(0)
    for read in (file.record, file.text):
        with pytest.raises(ValueError, match=f"{path}, record 1: .*{message}") as caught:
            read(1)
        assert "\n" not in str(caught.value)


def test_records_of_no_form_are_named_when_the_file_is_opened(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), path)
    with pytest.raises(ValueError, match=f'{path}, record 0: record: expected "messages", .*got "text"'):
        open_records(path)


def test_half_of_a_surrogate_pair_is_named(tmp_path):
    path = tmp_path / "data.parquet"
    pyarrow.parquet.write_table(table(a=pyarrow.array(['"\\ud800"'] * 2).cast(pyarrow.json_())), path)
    with pytest.raises(ValueError, match=r'record 0: expected Unicode text, got "\\ud800"'):
        open_records(path).text(0)


def cut(data):
    return data[: len(data) // 2]


def spoiled(data):
    return data[:20] + bytes(data[20:-20])[::-1] + data[-20:]


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd", "parquet", "stream", "file", "saved"])
@pytest.mark.parametrize("damage", [cut, spoiled])
def test_a_damaged_file_is_one_line(tmp_path, kind, damage, caches, capfd, monkeypatch):
    path = write(tmp_path / "data", kind, [{"prompt": str(i), "completion": "b"} for i in range(1000)])
    file = path / "data-00000-of-00002.arrow" if kind == "saved" else path
    file.write_bytes(damage(file.read_bytes()))
    capfd.readouterr()
    logged = logging.handlers.BufferingHandler(10)
    monkeypatch.setattr(datasets.utils.logging.get_logger("datasets"), "handlers", [logged])
    with pytest.raises(ValueError, match=f"data file '{file}' (is damaged|cannot be read by datasets)") as caught:
        open_records(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "") and logged.buffer == []
    assert not list(caches.rglob("*.partial"))


def unsound(path):
    """An Arrow file whose text begins and ends outside of it."""
    text = pyarrow.StringArray.from_buffers(
        2, pyarrow.py_buffer(np.array([0, 1, 2], np.int32)), pyarrow.py_buffer(b"ab")
    )
    write_stream(pyarrow.table({"prompt": text, "completion": text}), path)
    data, offsets = path.read_bytes(), np.array([0, 1, 2], np.int32).tobytes()
    assert data.count(offsets) == 2
    path.write_bytes(data.replace(offsets, np.array([1 << 29, 1 << 29, 1 << 30], np.int32).tobytes()))


@pytest.mark.parametrize("saved", [False, True])
def test_an_arrow_file_that_points_outside_of_itself_is_refused(tmp_path, saved):
    path = tmp_path / "data"
    if saved:
        write(path, "saved", PAIRS)
    unsound(path / "data-00000-of-00002.arrow" if saved else path)
    with pytest.raises(ValueError, match="cannot be read by datasets: ArrowInvalid"):
        open_records(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[{"prompt": "a", "completion": "b"}, 5]',
            "line 1: expected nothing next to an object of the array, got ', 5'",
        ),
        ('[\n{"prompt": "a", "completion": "b"}\n{"prompt": 1}]', "line 3: expected a comma next to an object"),
        ('["a"]', "line 1: expected nothing next to an object of the array, got '\"a\"'"),
        ("\n[[1]]", "line 2: expected an array of objects, got an array in it"),
        ('["' + '\\"' * 100_000, "line 1: expected the end of the JSON array"),
        ('[{"prompt": "a",\n "completion": "]}"}', "line 2: expected the end of the JSON array"),
        ('[{"prompt": "a", "completion": "b"}]\n[]', "line 2: expected nothing next to"),
        ('[\n{"prompt": "a",\n "completion"= "b"}]', ":3: expected JSON, got .*at column"),
        ('[{"prompt": "a", "completion": "b\n"}]', ":1: expected JSON, got Invalid control character"),
    ],
)
def test_a_json_array_that_is_none_is_named_with_its_line(tmp_path, text, message):
    path = tmp_path / "data.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{path}.*{message}") as caught:
        open_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"PK\x03\x04\x14\x00", "is a zip archive, .*unpack it: unzip"),
        (b"prompt,completion\na,b\n", "CSV.*read_csv"),
        (b"prompt\tcompletion\na\tb\n", "CSV"),
        (gzip.compress(b"prompt,completion\na,b\n"), ".*CSV.*read_csv"),
        (gzip.compress(gzip.compress(b"")), "is gzip, expected JSON lines"),
    ],
    ids=["zip", "csv", "tsv", "csv.gz", "gz.gz"],
)
def test_other_files_are_refused_with_advice(tmp_path, contents, message):
    path = tmp_path / "data.parquet"  # its name is nobody's business
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"data file '?{path}.*{message}"):
        open_records(path)


def test_a_path_that_the_library_takes_apart_is_named(tmp_path):
    path = write(tmp_path / "a::b", "parquet", PAIRS)
    with pytest.raises(ValueError, match=f"data file '{path}': expected a path without '::'"):
        open_records(path)


@pytest.mark.parametrize("kind", ["parquet", "stream", "file", "saved", "zstd"])
def test_without_the_library_its_extra_is_named(tmp_path, monkeypatch, kind):
    path = write(tmp_path / "data", kind, PAIRS)
    monkeypatch.setitem(sys.modules, "pyarrow" if kind == "zstd" else "datasets", None)
    advice = "(convert it: python|unpack it: zstd)"
    message = rf"{path}.* pip install 'qtarget_megatron\[data\]' \(or {advice}"
    with pytest.raises(ValueError, match=message) as caught:
        open_records(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["lines", "array", "gzip", "bzip2", "xz"])
def test_json_needs_no_library(tmp_path, monkeypatch, kind):
    path = write(tmp_path / "data", kind, PAIRS)
    for name in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, name, None)
    assert open_records(path).record(1) == PAIRS[1]


def test_nothing_is_asked_of_the_network(tmp_path, monkeypatch):
    def refused(*arguments, **keywords):
        raise AssertionError("a connection was asked for")

    paths = [write(tmp_path / f"parquet{kind}", kind, PAIRS) for kind in ("parquet", "stream", "saved")]
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    # as a name of the hub would be written, and with what patterns are made of
    os.rename(paths[0], tmp_path / "a[1]*?.parquet")
    monkeypatch.chdir(tmp_path)
    for path in ("a[1]*?.parquet", paths[1].name, paths[2].name):
        assert open_records(path).record(0) == PAIRS[0]
