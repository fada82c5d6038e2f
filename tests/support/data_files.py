"""The same records in files of every kind that data may be of."""

import bz2
import gzip
import json
import lzma

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet

from qtarget_megatron.data import JsonlFile


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


def many(count):
    return [{"prompt": f"{i} é", "completion": "x" * (i % 7), "weight": [i / 7] * (i % 3)} for i in range(count)]


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
