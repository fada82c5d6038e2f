"""Files of records, tokenizers, and which sample is drawn when."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil
import subprocess
from collections import Counter

import numpy as np
import pytest
import torch
from row_data import padded_rows, sizes_of
from small_tokenizers import CHATML, byte_tokenizer, chat

from qtarget_megatron.data import (
    JsonlFile,
    SampleOrder,
    compare_tokenizers,
    encode,
    load_tokenizer,
)


def write_lines(path, lines):
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return JsonlFile(path)


# ---- truncation, shift, padding


def test_labels_are_the_next_tokens_where_supervised(tmp_path):
    tokenizer = byte_tokenizer(size=256, special=["</s>"])
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "abc", "completion": "xy"}])
    item = dataset(file, tokenizer, 8, num_samples=1, pad_id=7)[0]
    a, b, c, x, y, end = tokenizer.convert_tokens_to_ids(["a", "b", "c", "x", "y", "</s>"])
    assert item["tokens"].tolist() == [a, b, c, x, y, end, 7, 7]
    assert item["labels"].tolist() == [-100, -100, x, y, end, -100, -100, -100]
    assert item["position_ids"].tolist() == list(range(8))
    assert item["sample"].shape == () and item["sample"] == 0
    assert item["padding"].dtype == torch.bool and item["padding"].tolist() == [False] * 6 + [True] * 2
    assert {value.dtype for name, value in item.items() if name != "padding"} == {torch.int64}


@pytest.mark.parametrize(
    ("seq_length", "truncated", "labels"),
    [
        (5, False, "..xy$"),  # inputs abcxy, labels bcxy$: the last id is a label only
        (4, True, "..xy"),
        (3, True, "..x"),
        (2, True, ""),
    ],
)
def test_truncation_keeps_one_label_beyond_the_inputs(tmp_path, seq_length, truncated, labels):
    tokenizer = byte_tokenizer(size=256, special=["</s>"])
    file = write_lines(tmp_path / "d.jsonl", [{"prompt": "abc", "completion": "xy"}])
    sizes = sizes_of(file, tokenizer, seq_length)
    assert sizes.truncated.tolist() == [truncated]
    assert sizes.supervised.tolist() == [len(labels.strip("."))] and sizes.tokens.tolist() == [seq_length + 1]
    if labels:
        names = {"x": "x", "y": "y", "$": "</s>"}
        want = [tokenizer.convert_tokens_to_ids(names[k]) if k in names else -100 for k in labels]
        item = padded_rows(file, tokenizer, seq_length, num_rows=1)[0]
        assert item["labels"].tolist() == want
        assert len(item["tokens"]) == seq_length


# ---- order


def dataset(file, tokenizer, seq_length=16, *, num_samples, **keywords):
    return padded_rows(file, tokenizer, seq_length, num_rows=num_samples, **keywords)


@pytest.fixture
def twenty(tmp_path):
    return write_lines(tmp_path / "d.jsonl", [{"prompt": "p", "completion": str(i)} for i in range(20)])


def order(data):
    return [int(data[i]["sample"]) for i in range(len(data))]


def test_every_epoch_holds_each_kept_sample_once_in_a_new_order(twenty):
    kept = [i for i in range(20) if i not in (3, 11)]
    drawn = order(dataset(twenty, byte_tokenizer(), kept=kept, num_samples=45))
    first, second, rest = drawn[:18], drawn[18:36], drawn[36:]
    assert sorted(first) == kept and sorted(second) == kept
    assert len(rest) == 9 and max(Counter(rest).values()) == 1
    assert first != second and first != kept


def test_order_depends_on_seed_and_position_alone(twenty):
    tokenizer = byte_tokenizer()
    data = dataset(twenty, tokenizer, num_samples=60, seed=4)
    drawn = order(data)
    again = dataset(twenty, tokenizer, num_samples=1000, seed=4)
    # another rank asks for other items, in another order, and for more of them
    assert {i: int(again[i]["sample"]) for i in (59, 0, 41, 20, 19)} == {i: drawn[i] for i in (59, 0, 41, 20, 19)}
    assert order(dataset(twenty, tokenizer, num_samples=60, seed=5)) != drawn
    assert order(dataset(twenty, tokenizer, num_samples=25, shuffle=False)) == [
        *range(20),
        *range(5),
    ]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_items_are_the_same_in_worker_processes(twenty):
    data = dataset(twenty, byte_tokenizer(), num_samples=40)
    here = order(data)  # opens the file before the workers are forked
    loader = torch.utils.data.DataLoader(data, batch_size=5, num_workers=2)
    batches = list(loader)
    assert torch.cat([batch["sample"] for batch in batches]).tolist() == here
    first = torch.stack([data[i]["labels"] for i in range(5)])
    assert torch.equal(batches[0]["labels"], first)
    assert order(pickle.loads(pickle.dumps(data))) == here


def test_order_of_an_epoch_is_drawn_once(twenty, monkeypatch):
    seeds = []
    original = np.random.PCG64
    monkeypatch.setattr(np.random, "PCG64", lambda seed: seeds.append(seed) or original(seed))
    order(dataset(twenty, byte_tokenizer(), num_samples=50, seed=9))
    assert seeds == [[9, 0], [9, 1], [9, 2]]


def test_items_outside_the_dataset_are_refused(twenty):
    data = dataset(twenty, byte_tokenizer(), num_samples=3)
    assert len(data) == 3
    for item in (3, -1):
        with pytest.raises(IndexError, match="of 3"):
            data[item]


def test_an_order_without_a_seed_is_refused():
    with pytest.raises(ValueError, match="seed: expected 0 or more, got -1"):
        SampleOrder([3], seed=-1)


# ---- files


def test_records_are_found_around_blank_lines_and_without_a_last_newline(tmp_path):
    path = tmp_path / "d.jsonl"
    records = [{"prompt": "é👧\u2028", "completion": str(i)} for i in range(3)]
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_bytes(("\ufeff" + lines[0] + "\r\n\n   \n" + lines[1] + "\n\n" + lines[2]).encode())
    file = JsonlFile(path)
    assert len(file) == 3
    assert [file.record(i) for i in (2, 0, 1)] == [records[2], records[0], records[1]]
    assert file.where(1) == f"{path}:4"
    with pytest.raises(IndexError):
        file.record(3)


GOOD = '{"prompt": "a", "completion": "b"}'
CHATTED = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "One"}]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a",', "expected JSON, got .* at column"),
        ("[1]", "record: expected an object, got a list"),
        ('{"text": "x", "id": 3}', 'expected "prompt" and "completion", got "text", "id"'),
        ('{"prompt": "a"}', 'expected "prompt" and "completion", got "prompt"'),
        ('{"prompt": "a", "completion": 3}', '"completion": expected a string, got 3'),
        ('{"messages": []}', '"messages": expected at least one message, got none'),
        ('{"messages": {"role": "user"}}', '"messages": expected a list, got an object'),
        ('{"messages": ["hi"]}', "message 0: expected an object, got a string"),
        (
            '{"messages": [{"role": "user"}]}',
            'message 0: expected "role" and "content", got no "content"',
        ),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            'message 0, "content": expected a string, got null',
        ),
        (
            '{"messages": [{"role": "bot", "content": "x"}]}',
            "message 0: expected role system, .*; got 'bot'",
        ),
        (
            '{"messages": [{"role": "user", "content": "x"}], "tools": {}}',
            '"tools": expected a list, got an object',
        ),
    ],
)
def test_malformed_lines_are_named_with_their_number(tmp_path, line, message):
    good = json.dumps(CHATTED) if "messages" in line else GOOD
    file = write_lines(tmp_path / "bad.jsonl", [good + "\n", "\n", line + "\n"])
    assert file.record(0) == json.loads(good)
    with pytest.raises(ValueError, match=r"bad\.jsonl:3: .*" + message) as caught:
        file.record(1)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"prompt": "\xff", "completion": ""}\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:1: expected UTF-8"):
        JsonlFile(tmp_path / "d.jsonl").record(0)


def test_missing_or_changed_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="No such file"):
        JsonlFile(tmp_path / "none.jsonl")
    file = write_lines(tmp_path / "d.jsonl", [GOOD + "\n"])
    (tmp_path / "d.jsonl").write_text("\n" + GOOD + "\n")
    with pytest.raises(ValueError, match="changed: it had 35 bytes, now 36"):
        file.record(0)


def rewritten(path, text):
    """Write into the file that there is, a moment later: another time, the same file and size."""
    later = os.stat(path).st_mtime_ns + 10**6
    with open(path, "r+") as file:
        file.write(text)
    os.utime(path, ns=(later, later))


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_data_that_is_rewritten_with_the_same_size_is_noticed(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(GOOD + "\n" + GOOD + "\n")
    file = JsonlFile(path)
    worker = pickle.loads(pickle.dumps(file))
    assert file.record(1) == worker.record(1) == json.loads(GOOD)
    # the same contents at another time are the same data: copied again, or touched
    rewritten(path, GOOD)
    assert file.record(0) == json.loads(GOOD)
    rewritten(path, GOOD.replace("b", "c"))
    for reader in (file, worker, pickle.loads(pickle.dumps(file))):
        with pytest.raises(ValueError, match="d.jsonl' changed: it has other contents of the same size") as caught:
            reader.record(1)
        assert "\n" not in str(caught.value)
    # a file that takes its place is looked at when it is opened
    data = JsonlFile(path)
    other = tmp_path / "other.jsonl"
    other.write_text(GOOD + "\n" + GOOD + "\n")
    os.replace(other, path)
    with pytest.raises(ValueError, match="other contents"):
        data_in_a_worker = pickle.loads(pickle.dumps(data))
        data_in_a_worker.record(0)
    # in a worker of the data loader
    read = write_lines(tmp_path / "read.jsonl", [GOOD + "\n"] * 20)
    samples = dataset(read, byte_tokenizer(), num_samples=40)
    rewritten(read.path, GOOD.replace("b", "c"))
    with pytest.raises(ValueError, match="other contents of the same size"):
        list(torch.utils.data.DataLoader(samples, batch_size=5, num_workers=1))


def test_a_file_is_indexed_once_in_a_process(tmp_path, monkeypatch):
    file = write_lines(tmp_path / "d.jsonl", [GOOD + "\n"])
    again = JsonlFile(tmp_path / "d.jsonl")
    assert again._index is file._index
    (tmp_path / "d.jsonl").write_text(GOOD + "\n" + GOOD + "\n")
    assert len(JsonlFile(tmp_path / "d.jsonl")) == 2


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (gzip.compress(GOOD.encode(), mtime=0), "is gzip, expected JSON lines in UTF-8: unpack it: gunzip"),
        (bz2.compress(GOOD.encode()), "is bzip2"),
        (lzma.compress(GOOD.encode()), "is xz"),
        (b"\x28\xb5\x2f\xfd\x24\x00", "is zstd"),
        (b"PK\x03\x04\x14\x00", "is a zip archive"),
        (b"PAR1\x15\x04\x15", "is parquet, .*read_parquet"),
        (b"ARROW1\x00\x00", "is arrow, "),
        (b"\xff\xff\xff\xff\x10\x00", "is an arrow stream"),
        (GOOD.encode("utf-16"), "is UTF-16 text, .*iconv -f UTF-16"),
        (GOOD.encode("utf-32"), "is UTF-32 text"),
        (GOOD.encode("utf-16-le"), "holds zero bytes"),
        (f"[{GOOD}, {GOOD}]".encode(), r":1: .*a JSON array: .*jq -c '\.\[\]'"),
        (f"[\n{GOOD},\n{GOOD}]".encode(), r":1: .*a JSON array"),
        (json.dumps([CHATTED], indent=1).encode(), r":1: .*a JSON array"),
        (("\n" + json.dumps(CHATTED, indent=1)).encode(), r":2: .*JSON spread over lines: .*jq -c \."),
        (b"prompt,completion\na,b\n", r":1: .*CSV.*read_csv"),
        (b"prompt\tcompletion\na\tb\n", r":1: .*CSV"),
        (b'"prompt', r":1: expected JSON"),
        (b"[" * 100_000, r":1: expected a record, got JSON nested too deep"),
        (b'{"prompt": "a", "completion": ' + b"[" * 100_000 + b"\n", ":1: expected a record, got JSON nested too deep"),
    ],
    ids=lambda value: ascii(value[:24]) if isinstance(value, bytes) else "",
)
def test_a_file_of_another_format_is_named_when_it_is_opened(tmp_path, contents, message):
    (tmp_path / "d.jsonl").write_bytes(contents)
    with pytest.raises(ValueError, match=r"d\.jsonl.*" + message) as caught:
        JsonlFile(tmp_path / "d.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(shutil.which("jq") is None, reason="the recipes are jq's")
@pytest.mark.parametrize(
    "contents",
    [json.dumps([CHATTED, CHATTED], indent=1), json.dumps(CHATTED, indent=1)],
    ids=["array", "spread"],
)
def test_the_recipe_that_is_given_makes_the_records(tmp_path, contents):
    path = tmp_path / "d.jsonl"
    path.write_text(contents)
    with pytest.raises(ValueError) as caught:
        JsonlFile(path)
    recipe = str(caught.value)[str(caught.value).index("jq ") :].replace("> data.jsonl", f"> {tmp_path}/data.jsonl")
    subprocess.run(recipe, shell=True, check=True)
    converted = JsonlFile(tmp_path / "data.jsonl")
    assert all(converted.record(i) == CHATTED for i in range(len(converted)))


# ---- tokenizers


def test_encoding_errors_in_a_file_name_the_line(tmp_path):
    file = write_lines(tmp_path / "d.jsonl", ["\n", chat("u:Hi", "a:One")])
    with pytest.raises(ValueError, match=r"d\.jsonl:2: the tokenizer has no chat template"):
        sizes_of(file, byte_tokenizer(), 8)


def test_tokenizer_survives_saving_and_loading(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    tokenizer.save_pretrained(tmp_path)
    record = chat("u:Hi 👧", "a:One")
    loaded = load_tokenizer(tmp_path)
    assert encode(loaded, record, 64).input_ids.tolist() == encode(tokenizer, record, 64).input_ids.tolist()
    compare_tokenizers(loaded, tokenizer)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer can be loaded from"),
        # transformers makes up a tokenizer of one token here
        ({"config.json": '{"model_type": "qwen3"}'}, "expected tokenizer.json, got no vocabulary"),
        ({"tokenizer.json": "{"}, "no tokenizer can be loaded from"),
        (
            {
                "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["x.Y", null]}}',
                "x.py": "raise SystemExit('code from the directory was run')",
            },
            "no tokenizer can be loaded from",
        ),
    ],
    ids=["empty", "model-only", "broken", "remote-code"],
)
def test_directories_without_a_tokenizer_are_refused(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="expected a directory"):
        load_tokenizer(tmp_path / "none")


def test_teacher_with_other_ids_is_named_token_by_token():
    ours = byte_tokenizer(size=256, special=["<a>", "<b>", "<c>"], eos=None)
    base = len(ours) - 3
    compare_tokenizers(ours, byte_tokenizer(size=256, special=["<a>", "<b>", "<c>"], eos=None))
    with pytest.raises(ValueError, match=rf"in 2 ids \(id {base}: '<a>' here, '<b>' there; id {base + 1}: "):
        compare_tokenizers(ours, byte_tokenizer(size=256, special=["<b>", "<a>", "<c>"], eos=None))
    with pytest.raises(ValueError, match=rf"\(id {base + 2}: '<c>' here, no token there\)"):
        compare_tokenizers(ours, byte_tokenizer(size=256, special=["<a>", "<b>"], eos=None))
