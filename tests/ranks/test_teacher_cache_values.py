"""What a teacher's probabilities cannot be is refused, written or read, as are files of absurd sizes."""

import json
import tracemalloc
import zlib

import numpy as np
import pytest
import torch.distributed as dist
from cache_files import LENGTHS, TOKENIZER, entries, header, read_all, write
from launching import run_ranks
from safetensors.numpy import load, save

from qtarget_megatron.resumable import ResumableDirectory, ResumableLines
from qtarget_megatron.teacher_cache import CacheWriter, TeacherCache, writer
from qtarget_megatron.teacher_cache.parts import PartContents

SAMPLE = 5  # five tokens


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(writer, "_PART_SAMPLES", 2)


def forge(directory, change):
    """Rewrite the only part, with change(tensors) made, and every checksum right."""
    (path,) = directory.glob("samples-*")
    data = path.read_bytes()
    described = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = {name: array.copy() for name, array in load(data).items()}
    change(tensors)
    of_tokens = [n for n in tensors if n in ("tail", "context", "top_log_p", "counts")]
    of_entries = [n for n in tensors if n in ("ids", "ids_high", "log_p")]
    for row in range(len(tensors["crc32"])):
        digest = 0
        for name in sorted(of_tokens + of_entries):
            table = "entry_offsets" if name in of_entries and "entry_offsets" in tensors else "token_offsets"
            begin, end = tensors[table][row : row + 2].tolist()
            digest = zlib.crc32(np.ascontiguousarray(tensors[name][begin:end]), digest)
        tensors["crc32"][row] = digest
    path.write_bytes(save(tensors, described["__metadata__"]))
    index = json.loads((directory / "cache.json").read_text())
    index["parts"] = [vars(PartContents(path, path.read_bytes()).part)]
    (directory / "cache.json").write_text(json.dumps(index))


def first(tensors, name):
    """The first of a tensor's rows of SAMPLE."""
    ragged = name in ("ids", "ids_high", "log_p") and "entry_offsets" in tensors
    return int(tensors["entry_offsets" if ragged else "token_offsets"][SAMPLE])


def put(name, value, entry=0):
    def change(tensors):
        at = first(tensors, name)
        if tensors[name].ndim == 2:
            tensors[name][at, entry] = value
        else:
            tensors[name][at + (entry if name in ("ids", "log_p") else 0)] = value

    return change


def twice(tensors):
    at = first(tensors, "ids")
    flat = tensors["ids"].reshape(-1, 1) if tensors["ids"].ndim == 1 else tensors["ids"]
    if tensors["ids"].ndim == 1:
        flat[at + 1] = flat[at]
    else:
        flat[at, 3] = flat[at, 0]


NUMBERS = "a log-probability above 0, or that is no number"
TAIL = "a tail below 0, above 1, or that is no number"
IMPOSSIBLE = {
    "an id that no token has": (put("ids", 300), "token id 300, expected at most 299"),
    "an id twice": (twice, "a token id twice"),
    "NaN among the entries": (put("log_p", np.nan, 1), NUMBERS),
    "an entry above the first": (put("log_p", 0.5, 1), NUMBERS),
    "+inf": (put("log_p", np.inf, 1), NUMBERS),
    "a tail below 0": (put("tail", -0.1), TAIL),
    "a tail above 1": (put("tail", 1.5), TAIL),
    "a tail of NaN": (put("tail", np.nan), TAIL),
    "a sum above 1": (put("tail", 0.999), "probabilities of a token that add up to 1."),
    "a sum below 1": (put("log_p", -60.0, 0), "probabilities of a token that add up to 0."),
}
OF_FLOAT16 = {
    "a first probability above 1": (put("top_log_p", 0.7), NUMBERS),
    "a first one of NaN": (put("top_log_p", np.nan), NUMBERS),
    "a first one of -inf": (put("top_log_p", -np.inf), NUMBERS),
}
OF_TOP_P = {
    "no entry": (put("counts", 0), "numbers of kept entries from 0 to"),
    "more than k": (put("counts", 9), "numbers of kept entries from . to 9"),
}
CASES = [
    *((case, dtype, None) for dtype in ("float16", "float32") for case in IMPOSSIBLE),
    *((case, "float16", None) for case in OF_FLOAT16),
    *((case, "float16", 0.9) for case in (*OF_TOP_P, "an id twice", "a sum above 1", "an id that no token has")),
]


def head_of(dtype, top_p):
    return header(dtype=dtype, top_p=top_p)


@pytest.mark.parametrize(("case", "dtype", "top_p"), CASES, ids=str)
def test_what_no_teacher_says_is_refused_though_every_checksum_is_right(tmp_path, case, dtype, top_p):
    change, reason = (IMPOSSIBLE | OF_FLOAT16 | OF_TOP_P)[case]
    write(tmp_path / "cache", head_of(dtype, top_p))
    # One entry to a token and more are there with top-p.
    assert top_p is None or (entries(head_of(dtype, top_p), SAMPLE, LENGTHS[SAMPLE]).counts[0] > 1)
    forge(tmp_path / "cache", lambda tensors: None)
    read_all(tmp_path / "cache")
    forge(tmp_path / "cache", change)
    cache = TeacherCache(tmp_path / "cache")
    cache.sample(SAMPLE - 3)
    expected = rf"samples-0000000000.safetensors holds {reason}.*\(sample {SAMPLE}\): restore it"
    for read in (lambda: cache.sample(SAMPLE), lambda: cache.verify(range(cache.num_parts))):
        with pytest.raises(ValueError, match=expected) as caught:
            read()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("ids", 300, "expected token ids from 0 to 299"),
        ("ids", -1, "expected token ids from 0 to 299"),
        ("log_p", 0.5, "a log-probability above 0"),
        ("log_p", np.nan, "a log-probability above 0"),
        ("tail", 1.5, "a tail below 0, above 1"),
        ("tail", np.nan, "a tail below 0, above 1"),
        ("tail", 0.999, "add up to 1."),
    ],
)
def test_what_no_teacher_says_is_not_written(tmp_path, dtype, field, value, reason):
    head = head_of(dtype, None)
    cache = CacheWriter(tmp_path / "cache", head, TOKENIZER)
    cache.open()
    bad = entries(head, SAMPLE, 5)
    getattr(bad, field)[(2, 0) if field != "tail" else 2] = value
    cache.append([None, entries(head, 1, 3)])
    with pytest.raises(ValueError, match=f"cache: sample 2 holds .*{reason}.*; it is not written"):
        cache.append([bad])


# Entries have a table of their own with top-p only.
@pytest.mark.parametrize(("top_p", "table"), [(None, "token_offsets"), (0.9, "token_offsets"), (0.9, "entry_offsets")])
@pytest.mark.parametrize("position", [0, 3, -1])
@pytest.mark.parametrize("value", [-5, 10**12])
def test_tables_that_point_elsewhere_are_refused(tmp_path, top_p, table, position, value):
    write(tmp_path / "cache", head_of("float16", top_p))
    forge(tmp_path / "cache", lambda tensors: tensors[table].__setitem__(position, value))
    with pytest.raises(ValueError, match=f"has {table} that do not go up from 0 to .*: restore it"):
        TeacherCache(tmp_path / "cache").sample(1)


# ---- absurd sizes


def deep(levels=200_000):
    return "[" * levels + "]" * levels


NASTY = [-1, -(10**12), 10**12, 2**63, 2**64, 10**30, 1e308, 2.5, True, None, "x", "", [], {}, [[]], float("nan")]


def refused(read):
    """The error of a read, in one line; what it took in memory is bounded."""
    tracemalloc.start()
    try:
        with pytest.raises(ValueError) as caught:
            read()
        assert tracemalloc.get_traced_memory()[1] < 20e6
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000
    return str(caught.value)


def same(one, other):
    return type(one) is type(other) and one == other


def test_no_number_in_the_index_is_taken_on_trust(tmp_path):
    write(tmp_path / "cache", head_of("float16", None))
    path = tmp_path / "cache" / "cache.json"
    index = json.loads(path.read_text())
    # Not read: the name, and what is compared by whoever trains.
    texts = {"teacher", "data", "tokenizer", "chat_template", "teacher_files", "teacher_checkpoint", "precision"}
    for field in index:
        for value in NASTY:
            if same(value, index[field]) or (field in texts and (isinstance(value, str) or value is None)):
                continue
            path.write_text(json.dumps(index | {field: value}))
            assert "cache.json" in refused(lambda: read_all(tmp_path / "cache")), (field, value)
    for field in index["parts"][0]:
        for value in NASTY:
            if same(value, index["parts"][0][field]):
                continue
            path.write_text(json.dumps(index | {"parts": [index["parts"][0] | {field: value}]}))
            refused(lambda: read_all(tmp_path / "cache"))
    path.write_text(deep())
    assert "cache.json" in refused(lambda: TeacherCache(tmp_path / "cache"))
    path.write_text(json.dumps(index))
    (tmp_path / "cache" / "vocabulary.json").write_text(deep())
    assert "vocabulary.json is missing or damaged" in refused(TeacherCache(tmp_path / "cache").get_vocab)


def with_head(data, head):
    begin = 8 + int.from_bytes(data[:8], "little")
    return len(head).to_bytes(8, "little") + head + data[begin:]


@pytest.mark.parametrize("top_p", [None, 0.9])
def test_no_number_in_a_part_s_header_is_taken_on_trust(tmp_path, top_p):
    write(tmp_path / "cache", head_of("float16", top_p))
    (path,) = (tmp_path / "cache").glob("samples-*")
    data = path.read_bytes()
    head = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    directory, checked = head_of("float16", top_p), 0

    def read(changed):
        PartContents(path, with_head(data, changed)).check(directory)

    for tensor in (name for name in head if name != "__metadata__"):
        begin, end = head[tensor]["data_offsets"]
        changes = [{"dtype": value} for value in (*NASTY, "F99999999999", "O8", "V16", "U4")]
        changes += [{"shape": value} for value in (*NASTY, [10**12], [-1], [-1, -1], [0, 10**30], [1] * 99, [True])]
        changes += [{"data_offsets": value} for value in (*NASTY, [0, 2**63], [-8, 0], [end, begin], [begin, 10**30])]
        for change in changes:
            refused(lambda c=change, t=tensor: read(json.dumps(head | {t: head[t] | c}).encode()))
            checked += 1
    known = json.loads(head["__metadata__"]["part"])
    for value in NASTY:
        refused(lambda v=value: read(json.dumps(head | {"__metadata__": v}).encode()))
        refused(lambda v=value: read(json.dumps(head | {"__metadata__": {"part": v}}).encode()))
        refused(lambda v=value: read(json.dumps(head | {"__metadata__": {"part": json.dumps(v)}}).encode()))
        for key in known:
            changed = json.dumps({"__metadata__": {"part": json.dumps(known | {key: value})}, **head})
            path.write_bytes(with_head(data, changed.encode()))
            if not same(known[key], value):
                refused(lambda: read_all(tmp_path / "cache"))
    refused(lambda: read(deep().encode()))
    refused(lambda: read(json.dumps(head | {"__metadata__": {"part": deep()}}).encode()))
    for length in (2**63, 2**64 - 1, 10**12, 5 << 20):
        refused(lambda n=length: PartContents(path, n.to_bytes(8, "little") + bytes(6 << 20)))
    assert checked > 300


def test_headers_of_what_was_begun_are_read_with_care(tmp_path):
    lines = ResumableLines(tmp_path / "out.jsonl", {"a": 1})
    (tmp_path / "out.jsonl.partial").write_text("{}\n")
    folder = ResumableDirectory(tmp_path / "out", {"a": 1})
    (tmp_path / ".out.incomplete" / ".complete").mkdir(parents=True)
    (tmp_path / ".out.incomplete" / "file").write_text("")
    for text in (deep(), "[" * 10**6, "1" * 10**5, "[1]", "3", "{"):
        (tmp_path / "out.jsonl.partial.json").write_text(text)
        (tmp_path / ".out.incomplete" / ".complete" / "made-from.json").write_text(text)
        assert "is missing or damaged" in refused(lambda: lines.check(overwrite=False, inputs=[]))
        assert "is missing or damaged" in refused(folder.check)


# ---- at the start


def verified(directory):
    from qtarget_megatron.megatron.training.datasets import verify_cache

    cache, numbers = TeacherCache(directory), []
    verify = TeacherCache.verify

    def remember(self, parts):
        numbers.extend(parts)
        verify(self, parts)

    TeacherCache.verify = remember
    try:
        verify_cache(cache)
        return dist.get_rank(), numbers, None
    except ValueError as error:
        return dist.get_rank(), numbers, str(error)


@pytest.mark.distributed
def test_a_flipped_bit_is_found_at_the_start_whichever_rank_reads_it(tmp_path, small_parts):
    write(tmp_path / "cache", header())
    assert run_ranks(2, verified, (tmp_path / "cache",), timeout=120) == [(0, [0, 2], None), (1, [1, 3], None)]
    path = tmp_path / "cache" / "samples-0000000002.safetensors"
    data = bytearray(path.read_bytes())
    data[data.index(TeacherCache(tmp_path / "cache").sample(2)[2].tobytes())] ^= 1
    path.write_bytes(data)
    for _, _, problem in run_ranks(2, verified, (tmp_path / "cache",), timeout=120):
        assert f"{path} is corrupt at sample 2" in problem
