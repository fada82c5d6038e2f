"""Files of records, tokenizers, and which sample is drawn when."""

import json
import pickle
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
