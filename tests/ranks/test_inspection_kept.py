"""What a start finds in its data is kept for the next one, and only for that."""

import contextlib
import datetime
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from launching import run_ranks
from row_data import sizes_of
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, jsonl

pytestmark = pytest.mark.distributed

COUNT = 1200


def write(path, count=COUNT, answer="One"):
    lines = []
    for i in range(count):
        turns = [{"role": "user", "content": "Hi" * (i % 7)}, {"role": "assistant", "content": answer * (i % 5)}]
        lines.append(json.dumps({"messages": turns, "weight": 1 + i % 3}) + "\n")
    path.write_text("".join(lines))


def tokenizer(system=""):
    return byte_tokenizer(system + CHATML, eos="<|im_end|>")


def inspected(path, cache):
    """On every rank: what each start says, and whether it read the data."""
    from qtarget_megatron.megatron.runtime import logs
    from qtarget_megatron.megatron.training import inspection

    os.environ["QTARGET_CACHE_DIR"] = str(cache)
    measure, read = inspection.measure_samples, []
    inspection.measure_samples = lambda *args: read.append(len(args[3])) or measure(*args)
    printed = io.StringIO()

    def start(system="", seq_length=40, **keywords):
        keywords = {"token_inputs": ("weight",), "date": datetime.date(2026, 1, 2)} | keywords
        read.clear()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), logs.shown():
            found = inspection.inspect("reading", JsonlFile(path), tokenizer(system), seq_length, **keywords)
        return found, bool(read)

    results = {"first": start(), "second": start()}
    results["longer"] = start(seq_length=41)
    results["template"] = start(system="{{ 'x' }}")
    results["inputs"] = start(token_inputs=())
    results["date"] = start(date=None)
    results["template of the day"] = start(system="{{ strftime_now('%Y') }}")
    results["another day"] = start(system="{{ strftime_now('%Y') }}", date=None)
    results["checked"] = start(check=lambda index, sample: None, checked_by="one")
    results["checked again"] = start(check=lambda index, sample: None, checked_by="one")
    results["checked otherwise"] = start(check=lambda index, sample: None, checked_by="another")
    results["checked by what has no name"] = start(check=lambda index, sample: None)
    if os.environ.get("RANK", "0") == "0":
        for kept in Path(cache, "inspections").glob("*.npz"):
            kept.write_bytes(kept.read_bytes()[:100])
    import torch.distributed as dist

    dist.barrier()
    results["damaged"] = start()
    results["mended"] = start()
    dist.barrier()
    if dist.get_rank() == 0:
        write(path, answer="Two")
    dist.barrier()
    results["other data"] = start()
    if dist.get_rank() == 0:
        write(path, count=20)
    dist.barrier()
    results["few"] = start()
    results["few again"] = start()
    (Path(cache).with_name(f"file-{dist.get_rank()}")).touch()
    os.environ["QTARGET_CACHE_DIR"] = str(Path(cache).with_name(f"file-{dist.get_rank()}"))
    dist.barrier()
    if dist.get_rank() == 0:
        write(path)
    dist.barrier()
    results["nowhere to keep it"] = start()
    return results, printed.getvalue()


READ = {"first", "longer", "template", "inputs", "template of the day", "another day", "checked", "checked otherwise"}
READ |= {"checked by what has no name", "damaged", "other data", "few", "few again", "nowhere to keep it"}


def test_a_second_start_does_not_read_the_data_again(tmp_path):
    path = tmp_path / "d.jsonl"
    write(path)
    expected = sizes_of(JsonlFile(path), tokenizer(), 40)
    results = run_ranks(2, inspected, (path, tmp_path / "cache"), timeout=120, megatron=True)
    for found, _ in results:
        assert {name for name, (_, was_read) in found.items() if was_read} == READ
        for name in ("first", "second", "damaged", "mended", "checked again", "nowhere to keep it"):
            inspection = found[name][0]
            assert np.array_equal(inspection.sizes.tokens, expected.tokens), name
            assert np.array_equal(inspection.sizes.supervised, expected.supervised), name
            assert np.array_equal(inspection.sizes.truncated, expected.truncated), name
            assert inspection.notes == found["first"][0].notes and inspection.notes.answers == COUNT - COUNT // 5
            assert inspection.ranges == {"weight": (1.0, 3.0)}
        assert found["second"][0].known is not None and found["first"][0].known is None
    assert "the next start will read the data again; QTARGET_CACHE_DIR names another folder" in results[0][1]


def memory(path, cache):
    """Bytes for each record at most while a start opens, inspects and plans them, beside those of a few records."""
    import tracemalloc

    from qtarget_megatron.data import RowPlan, SampleOrder, aligned_lengths
    from qtarget_megatron.megatron.training.inspection import inspect

    os.environ["QTARGET_CACHE_DIR"] = str(cache)
    peaks = []
    for name in ("few", "many"):
        tracemalloc.start()
        records = JsonlFile(f"{path}-{name}")
        found = inspect("reading", records, tokenizer(), 40)
        taken = aligned_lengths(found.sizes.tokens.clip(max=40), 8)
        RowPlan(SampleOrder([len(taken)], seed=1), taken, 40).epoch(0)
        peaks.append((len(records), tracemalloc.get_traced_memory()[1]))
        tracemalloc.stop()
    (few, before), (many, peak) = peaks
    return (peak - before) / (many - few)


def test_a_record_takes_less_than_a_hundred_bytes(tmp_path):
    for name, count in (("few", 4500), ("many", 13_500)):
        write(tmp_path / f"d-{name}", count)
    found = run_ranks(2, memory, (tmp_path / "d", tmp_path / "cache"), timeout=200, megatron=True)
    assert all(0 < value < 100 for value in found), found


def test_the_places_of_a_large_files_records_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("QTARGET_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(jsonl, "_KEPT_FROM", 1000)
    path = tmp_path / "d.jsonl"
    write(path, count=50)
    before = JsonlFile(path)
    jsonl._indexed.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "_index", lambda path: pytest.fail("it is read again"))
        again = JsonlFile(path)
    assert again.digest == before.digest and again.record(49) == before.record(49) and len(again) == 50
    jsonl._indexed.cache_clear()
    write(path, count=50, answer="Other")
    assert JsonlFile(path).digest != before.digest
