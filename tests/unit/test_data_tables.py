"""Data that are no plain JSON lines: the same records from every kind of file and folder."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from data_files import CALLS, JSON, PAIRS, RECORDS, TABLES, call, lines, turn, without_null, write, written

from qtarget_megatron.data import ConcatenatedRecords, open_records

pytestmark = pytest.mark.usefixtures("caches")


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


@pytest.mark.parametrize("kind", ["stream", "saved"])
def test_empty_objects_stay(tmp_path, kind):
    records = [{"prompt": "a", "completion": "b", "x": [{}, None, {}], "y": {"z": {}}, "w": []}]
    assert open_records(write(tmp_path / "data", kind, records * 2)).record(1) == records[0]


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
    parts = {"b.x": CALLS[2:], "a.x": CALLS[:2], "c.x": CALLS[1:]}
    for name, records in parts.items():
        write(folder / name, kind, records)
    for name in (".hidden", "_SUCCESS", "_metadata", "README.md", "readme"):
        (folder / name).write_text("no data")
    write(folder / "sub" / "d.x", kind, PAIRS)
    file = open_records(folder)
    want = [*CALLS, *CALLS[1:]]
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
    parts = [written(tmp_path / f"{i}.jsonl", records) for i, records in enumerate([CALLS, [], CALLS[1:], []])]
    for chosen in ([], parts[1:2], parts[:1], parts):
        file, want = ConcatenatedRecords("all", chosen), [part.text(i) for part in chosen for i in range(len(part))]
        assert len(file) == len(want) and [file.text(i) for i in range(len(want))] == want
        assert file.num_bytes == sum(part.num_bytes for part in chosen)
    assert file.where(3) == parts[2].where(0) and file.record(np.int64(4)) == parts[2].record(1)
    assert file.digest != ConcatenatedRecords("all", parts[:3]).digest
    assert pickle.loads(pickle.dumps(file)).record(4) == parts[2].record(1)
    assert file.form == "messages" and file.raw(4) == CALLS[2]


def test_files_of_other_forms_do_not_stand_in_one_folder(tmp_path):
    for name, records in (("a", CALLS), ("b", PAIRS)):
        write(tmp_path / name, "lines", records)
    with pytest.raises(ValueError, match=r"b:1: expected a record of the form messages, as in .*a, got prompt"):
        open_records(tmp_path)
    with pytest.raises(ValueError, match="a:1: .*prompt"):
        open_records(tmp_path, "prompt")


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
