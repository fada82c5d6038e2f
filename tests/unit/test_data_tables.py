"""Data that are no plain JSON lines: the same records from every kind of file, and what is said of those that are not
read."""

import bz2
import concurrent.futures
import gzip
import hashlib
import json
import lzma
import multiprocessing
import os
import pickle
import resource
import socket
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.cache_folder import cache_folder
from qtarget_megatron.data import ConcatenatedRecords, JsonlFile, SupervisedDataset, open_records
from qtarget_megatron.data.tables import TableFile


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch):
    """The folder of all caches."""
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def call(name, arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def turn(role, content=None, **fields):
    return {"role": role, "content": content, **fields}


TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "string"}}}}}
]
CALLS = [
    {"messages": [turn("user", "Hi é👧\u2028"), turn("assistant", "One", weight=1)], "tools": None, "id": 1},
    {
        "messages": [
            turn("user", "Rain?"),
            turn("assistant", tool_calls=[call("weather", {"city": "5", "days": 3}), call("time", {"zone": None})]),
            turn("tool", "no"),
            turn("assistant", "2024-01-02"),
        ],
        "tools": TOOLS,
        "id": 2,
    },
    {
        "messages": [turn("user", "?"), turn("assistant", "", tool_calls=[call("time", {"at": "2024-01-01"})])],
        "id": None,
    },
]
PARTS = [
    {"messages": [turn("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), turn("assistant", [])]},
    {"messages": [turn("user", []), turn("assistant", [{"type": "text", "text": "日本"}])]},
]
PAIRS = [
    {"prompt": "2 + 2 =", "completion": " 4", "old_log_prob": [-0.12345678901234568, 1e-12], "weight": 0.1, "ok": True},
    {"prompt": "", "completion": "2024-01-01", "old_log_prob": [], "weight": 3.0, "ok": None},
]
RECORDS = {"calls": CALLS, "parts": PARTS, "pairs": PAIRS}


# ---- how each kind is written


def lines(records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def array(records):
    return b"\xef\xbb\xbf\n" + json.dumps(records, indent=1, ensure_ascii=False).replace("\n", "\r\n").encode()


def zstd(data):
    """Two frames, as parallel compressors write."""
    frames = []
    for part in (data[:40], data[40:]):
        stream = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(stream, "zstd") as file:
            file.write(part)
        frames.append(stream.getvalue().to_pybytes())
    return b"".join(frames)


JSON = {
    "lines": lines,
    "array": array,
    "gzip": lambda records: gzip.compress(lines(records)),
    "bzip2": lambda records: bz2.compress(lines(records)),
    "xz": lambda records: lzma.compress(array(records)),
    "zstd": lambda records: zstd(lines(records)),
}


def write_stream(table, path):
    with pyarrow.ipc.new_stream(path, table.schema) as file:
        file.write_table(table, max_chunksize=2)


def write_file(table, path):
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table, max_chunksize=2)


TABLES = {
    "parquet": lambda table, path: pyarrow.parquet.write_table(table, path, row_group_size=2),
    "stream": write_stream,
    "file": write_file,
    "feather": lambda table, path: pyarrow.feather.write_feather(table, path, compression="zstd"),
    "saved": lambda table, path: datasets.Dataset(table).save_to_disk(path, num_shards=2),
}


def without_null(value):
    """Fields of objects that are null dropped: what Arrow can tell."""
    if isinstance(value, dict):
        return {key: without_null(entry) for key, entry in value.items() if entry is not None}
    return [without_null(entry) for entry in value] if isinstance(value, list) else value


def written(path, records):
    path.write_bytes(lines(records))
    return JsonlFile(path)


def write(path, kind, records):
    """A file, or folder, of a kind; whatever it is called it is known by its contents."""
    if kind in JSON:
        path.write_bytes(JSON[kind](records))
    else:
        TABLES[kind](pyarrow.Table.from_pylist(records), path)
    return path


# ---- the same records


@pytest.mark.parametrize("kind", JSON)
@pytest.mark.parametrize("name", RECORDS)
def test_json_of_any_kind_holds_the_records_of_json_lines(tmp_path, kind, name):
    plain = written(tmp_path / "plain.jsonl", RECORDS[name])
    path = write(tmp_path / "data", kind, RECORDS[name])
    file = open_records(path)
    assert file.path == str(path) and len(file) == len(plain)
    for i in range(len(plain)):
        assert file.record(i) == plain.record(i) == RECORDS[name][i]
        text = file.text(i)
        assert json.loads(text) == plain.record(i) and "\n" not in text.rstrip("\n") and "\r" not in text
        assert file.where(i).startswith(f"{path}:")
    assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    assert file.num_bytes >= sum(len(file.text(i).encode()) for i in range(len(file)))


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("name", RECORDS)
def test_tables_hold_the_records_of_json_lines_without_null(tmp_path, kind, name):
    plain = written(tmp_path / "plain.jsonl", RECORDS[name])
    path = write(tmp_path / "data", kind, RECORDS[name])
    file = open_records(path)
    assert file.path == str(path) and len(file) == len(plain)
    for i in range(len(plain)):
        assert file.record(i) == without_null(plain.record(i))
        assert json.loads(file.text(i)) == file.record(i) and file.text(i).isascii() == plain.text(i).isascii()
    texts = [file.text(i).encode() for i in range(len(file))]
    assert abs(file.num_bytes - sum(map(len, texts)) - len(texts)) <= len(texts)
    if path.is_file():
        assert file.where(1) == f"{path}, record 1"
        assert file.digest == hashlib.sha256(path.read_bytes()).hexdigest()
    else:
        assert file.where(len(file) - 1) == f"{path}/data-00001-of-00002.arrow, record 0"


def test_columns_of_json_text_are_that_json(tmp_path):
    """What the library makes of records whose fields differ in type."""
    records = [
        {"messages": [turn("user", "Hi"), turn("assistant", tool_calls=[call("f", {"a": [1, "1", None], "b": 0.1})])]},
        {"messages": [turn("user", [{"type": "text", "text": "Hi"}]), turn("assistant", "One")]},
        {
            "messages": [
                turn("user", "Hi"),
                turn("assistant", tool_calls=[call("f", {"a": {"c": 12345678901234567890123}})]),
            ]
        },
    ]
    text = pyarrow.array([json.dumps(record["messages"]) for record in records]).cast(pyarrow.json_())
    pyarrow.parquet.write_table(pyarrow.table({"messages": text, "a": [0, 1, 2]}), tmp_path / "text.parquet")
    file = open_records(tmp_path / "text.parquet")
    assert [file.record(i)["messages"] for i in range(3)] == [record["messages"] for record in records]
    mixed = datasets.Dataset.from_list(records[:2], on_mixed_types="use_json")
    assert "Json" in str(mixed.features)
    mixed.to_parquet(tmp_path / "mixed.parquet")
    mixed.save_to_disk(tmp_path / "mixed")
    for path in (tmp_path / "mixed.parquet", tmp_path / "mixed"):
        file = open_records(path)
        assert [without_null(file.record(i)) for i in range(2)] == [without_null(record) for record in records[:2]]


@pytest.mark.parametrize("kind", [*JSON, *TABLES])
def test_a_source_without_records_is_empty(tmp_path, kind):
    if kind in JSON:
        path = write(tmp_path / "data", kind, [])
    else:
        path = tmp_path / "data"
        schema = pyarrow.Table.from_pylist(PAIRS).schema
        datasets.Dataset(schema.empty_table()).save_to_disk(path) if kind == "saved" else TABLES[kind](
            schema.empty_table(), path
        )
    file = open_records(path)
    assert len(file) == file.num_bytes == 0
    with pytest.raises(IndexError):
        file.record(0)


# ---- folders


@pytest.mark.parametrize("kind", ["lines", "array", "gzip", "parquet", "file"])
def test_a_folder_of_files_is_read_in_the_order_of_their_names(tmp_path, kind):
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    parts = {"b.x": CALLS[2:], "a.x": CALLS[:2], "c.x": PAIRS}
    for name, records in parts.items():
        write(folder / name, kind, records)
    for name in (".hidden", "_SUCCESS", "_metadata", "README.md", "readme"):
        (folder / name).write_text("no data")
    write(folder / "sub" / "d.x", kind, PAIRS)
    file = open_records(folder)
    want = [*CALLS, *PAIRS]
    assert len(file) == 5 and file.path == str(folder)
    assert [without_null(file.record(i)) for i in range(5)] == [without_null(record) for record in want]
    assert [json.loads(file.text(i)) for i in range(5)] == [file.record(i) for i in range(5)]
    places = [file.where(i) for i in range(5)]
    assert [Path(place.split(":")[0].split(",")[0]).name for place in places] == ["a.x"] * 2 + ["b.x"] + ["c.x"] * 2
    known = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in sorted(parts)]
    assert file.digest == hashlib.sha256(json.dumps(known).encode()).hexdigest()
    assert file.num_bytes == sum(open_records(folder / name).num_bytes for name in parts)
    for index in (-1, 5):
        with pytest.raises(IndexError):
            file.where(index)


def test_types_may_differ_from_file_to_file_and_line_to_line(tmp_path):
    """What a table of one schema could not hold."""
    records = [{**PAIRS[0], "weight": weight} for weight in (1, [0.5, 2], "1", {"a": 1}, None)]
    for number, record in enumerate(records):
        (tmp_path / f"{number}.jsonl").write_bytes(lines([PAIRS[0], record]))
    file = open_records(tmp_path)
    assert [file.record(2 * i + 1) for i in range(5)] == records


def test_concatenated_records_are_those_of_their_parts(tmp_path):
    parts = [written(tmp_path / f"{i}.jsonl", records) for i, records in enumerate([CALLS, [], PAIRS, []])]
    for chosen in ([], parts[1:2], parts[:1], parts):
        file, want = ConcatenatedRecords("all", chosen), [part.text(i) for part in chosen for i in range(len(part))]
        assert len(file) == len(want) and [file.text(i) for i in range(len(want))] == want
        assert file.num_bytes == sum(part.num_bytes for part in chosen)
    assert file.where(3) == parts[2].where(0) and file.record(np.int64(4)) == PAIRS[1]
    assert file.digest != ConcatenatedRecords("all", parts[:3]).digest
    assert pickle.loads(pickle.dumps(file)).record(4) == PAIRS[1]


def saved_dict(folder):
    table = pyarrow.Table.from_pylist(PAIRS)
    datasets.DatasetDict({"train": datasets.Dataset(table), "test": datasets.Dataset(table)}).save_to_disk(folder)


def mixture(folder):
    write(folder / "a.jsonl", "lines", PAIRS)
    write(folder / "b.jsonl", "gzip", PAIRS)
    write(folder / "c.jsonl", "gzip", PAIRS)


def saved_elsewhere(folder):
    write(folder / "secret", "stream", PAIRS)
    write(folder / "data", "saved", PAIRS)
    state = json.loads((folder / "data" / "state.json").read_text())
    state["_data_files"][0]["filename"] = "../secret"
    (folder / "data" / "state.json").write_text(json.dumps(state))
    for name in ("state.json", "dataset_info.json"):
        os.replace(folder / "data" / name, folder / name)


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda folder: None, "expected data files in it, found none"),
        (lambda folder: (folder / "train").mkdir(), r"found none \(sub-folders are not searched: train\)"),
        (saved_dict, "is a DatasetDict of test, train: name one of them, as .*/test"),
        (mixture, r"files of one kind, got text \(a.jsonl, 1 in all\), gzip \(b.jsonl, 2 in all\): move"),
        (saved_elsewhere, "expected a state.json that lists the data files of save_to_disk, got .*other folders"),
        (
            lambda folder: [(folder / n).write_text("[]") for n in ("state.json", "dataset_info.json")],
            "a state.json that",
        ),
    ],
    ids=["empty", "sub-folders", "dict", "mixture", "outside", "state"],
)
def test_a_folder_that_is_not_read_is_one_line(tmp_path, fill, message):
    folder = tmp_path / "data"
    folder.mkdir()
    fill(folder)
    with pytest.raises(ValueError, match=f"data folder '{folder}'.*{message}") as caught:
        open_records(folder)
    assert "\n" not in str(caught.value)


# ---- what is refused


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
def test_a_damaged_file_is_one_line(tmp_path, kind, damage, caches, capfd):
    path = write(tmp_path / "data", kind, [{"prompt": str(i), "completion": "b"} for i in range(1000)])
    file = path / "data-00000-of-00002.arrow" if kind == "saved" else path
    file.write_bytes(damage(file.read_bytes()))
    capfd.readouterr()
    with pytest.raises(ValueError, match=f"data file '{file}' (is damaged|cannot be read by datasets)") as caught:
        open_records(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")
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


def many(count):
    return [{"prompt": f"{i} é", "completion": "x" * (i % 7), "weight": [i / 7] * (i % 3)} for i in range(count)]


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
    samples = SupervisedDataset(
        file, byte_tokenizer(CHATML), 8, status=np.zeros(len(file), np.uint8), num_samples=64, seed=0, pad_id=0
    )
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
