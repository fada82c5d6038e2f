"""The teacher cache: what comes back, in how many bytes, and what it is compared with."""

import dataclasses
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
from cache_files import LENGTHS, TOKENIZER, VOCABULARY, entries, header, text, write
from small_tokenizers import CHATML, LLAMA3, byte_tokenizer, chat

from qtarget_megatron import teacher_cache
from qtarget_megatron.data import encode
from qtarget_megatron.teacher_cache import (
    CacheHeader,
    CacheWriter,
    SampleEntries,
    TeacherCache,
    context_digests,
    reader,
    template_digest,
    tokenizer_digest,
    writer,
)
from qtarget_megatron.teacher_cache.index import Index, read_index


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(writer, "_PART_SAMPLES", 2)


# ---- what comes back


@pytest.mark.parametrize("vocab_size", [300, 1 << 16, (1 << 16) + 1, 1 << 24])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_samples_come_back_in_any_order(tmp_path, small_parts, monkeypatch, vocab_size, dtype, top_p):
    monkeypatch.setattr(reader, "_MAPPED_PARTS", 2)
    head = header(vocab_size=vocab_size, dtype=dtype, top_p=top_p)
    write(tmp_path / "cache", head)
    cache = TeacherCache(tmp_path / "cache")
    assert len(cache) == len(LENGTHS) and cache.num_tokens == sum(LENGTHS) and cache.header == head
    assert len(list((tmp_path / "cache").glob("samples-*"))) == 4
    for index in [5, 0, 7, 1, 5, 2, 3, 6, 4, 1]:
        ids, log_p, tail = cache.sample(index)
        assert (ids.dtype, log_p.dtype, tail.dtype) == (np.int64, np.float32, np.float32)
        assert ids.shape == log_p.shape == (LENGTHS[index], 4) and tail.shape == (LENGTHS[index],)
        expected = entries(head, index, LENGTHS[index])
        if expected is None:
            continue
        np.testing.assert_array_equal(tail, expected.tail.astype(np.float32))
        kept = np.arange(4) < expected.counts[:, None]
        np.testing.assert_array_equal(ids, np.where(kept, expected.ids, -1))
        assert (log_p[~kept] == -np.inf).all()
        np.testing.assert_array_equal(log_p[:, 0], expected.log_p[:, 0])
        if dtype == "float32":
            np.testing.assert_array_equal(log_p[kept], expected.log_p[kept])
        else:
            # Half a unit of float16, of what is rounded, and of the float32 sum.
            below = np.abs(expected.log_p - expected.log_p[:, :1])
            bound = below * 2.0**-11 + 2.0**-24 + np.abs(expected.log_p) * 2.0**-22
            assert (np.abs(log_p - expected.log_p)[kept] <= bound[kept]).all()
            if index == 5:
                assert (log_p != expected.log_p)[kept].any(), "nothing was rounded"
    with pytest.raises(IndexError, match="sample 8 of 8"):
        cache.sample(8)
    with pytest.raises(IndexError, match="sample -1 of 8"):
        cache.sample(-1)


def test_statistics_of_a_cache(tmp_path, small_parts):
    head = header(top_p=0.9)
    write(tmp_path / "cache", head)
    samples = [s for seed, n in enumerate(LENGTHS) if (s := entries(head, seed, n))]
    cache = TeacherCache(tmp_path / "cache")
    assert cache.num_entries == sum(sample.counts.sum() for sample in samples)
    assert cache.mean_tail == pytest.approx(np.concatenate([s.tail for s in samples]).mean(), rel=1e-6)
    assert cache.num_bytes == sum(path.stat().st_size for path in (tmp_path / "cache").glob("samples-*"))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0, 0]])
@pytest.mark.parametrize("top_p", [None, 0.9])
def test_caches_without_a_supervised_token(tmp_path, lengths, top_p):
    write(tmp_path / "cache", header(len(lengths), top_p=top_p), lengths)
    cache = TeacherCache(tmp_path / "cache")
    cache.check(vocab_size=1)
    assert (len(cache), cache.num_tokens, cache.mean_tail) == (len(lengths), 0, 0)
    for index in range(len(lengths)):
        assert [array.shape for array in cache.sample(index)] == [(0, 4), (0, 4), (0,)]


def test_probabilities_below_float16_become_zero(tmp_path):
    log_p = np.array([[-1e-4, -70000, -np.inf]], dtype=np.float32)
    sample = SampleEntries(np.array([[1, 2, 3]]), log_p, np.array([3]), np.array([1e-9]), np.zeros(1, np.uint32))
    cache = CacheWriter(tmp_path / "cache", header(1, k=3), TOKENIZER)
    cache.open()
    cache.append([sample])
    cache.finish()
    ids, log_p, tail = TeacherCache(tmp_path / "cache").sample(0)
    assert ids.tolist() == [[1, 2, 3]] and log_p[0, 0] == np.float32(-1e-4) and (log_p[0, 1:] == -np.inf).all()


# ---- bytes


@pytest.mark.parametrize("vocab_size", [1 << 16, 1 << 17])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("k", [8, 32, 128])
def test_bytes_per_token_are_those_of_the_documentation(tmp_path, vocab_size, dtype, k):
    n = 300
    head = header(1, vocab_size=vocab_size, dtype=dtype, k=k)
    write(tmp_path / "cache", head, [n])
    # Opened by the library of the format, not by ours.
    (path,) = (tmp_path / "cache").glob("samples-*.safetensors")
    with safetensors.safe_open(path, framework="numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert tensors["ids"].shape == tensors["log_p"].shape == (n, k)
    tables = sum(tensors.pop(name).nbytes for name in ("token_offsets", "crc32"))
    per_token = sum(array.nbytes for array in tensors.values()) / n
    assert per_token == head.bytes_per_token and tables == 12 + 8
    assert path.stat().st_size < n * per_token + 1200
    block = teacher_cache.__doc__.split("Bytes per token")[1]
    row = {65536: {"float16": 0, "float32": 1}, 131072: {"float16": 2, "float32": 3}}[vocab_size][dtype]
    numbers = re.findall(r"float\d\d +(\d) k \+ +(\d+) +(\d+) +(\d+) +(\d+)\n", block)[row]
    factor, constant, *examples = map(int, numbers)
    assert per_token == factor * k + constant == examples[[8, 32, 128].index(k)]


def test_top_p_stores_only_what_is_kept(tmp_path):
    head = header(1, k=100, top_p=0.9, vocab_size=1 << 17)
    write(tmp_path / "cache", head, [200])
    kept = int(entries(head, 0, 200).counts.sum())
    cache = TeacherCache(tmp_path / "cache")
    assert cache.num_entries == kept < 200 * 70
    assert cache.num_bytes < 5 * kept + (12 + 2) * 200 + 1500


# ---- what the teacher read


def test_context_digests_tell_ids_and_supervision_up_to_a_token():
    ids, supervised = text(1, 6)
    last = int(np.flatnonzero(supervised)[-1])
    whole = context_digests(ids, supervised)
    assert len(set(whole.tolist())) == 6
    for cut in range(len(ids)):
        expected = whole[: int(supervised[:cut].sum())]
        np.testing.assert_array_equal(context_digests(ids[:cut], supervised[:cut]), expected)
    for position in range(last + 1):
        other = ids.copy()
        other[position] += 1
        digests = context_digests(other, supervised)
        changed = position <= np.flatnonzero(supervised)
        assert ((digests != whole) == changed).all()
    assert (context_digests(ids.astype(np.int32), supervised) == whole).all()


def test_a_sample_is_matched_with_what_training_reads(tmp_path):
    write(tmp_path / "cache", header())
    cache = TeacherCache(tmp_path / "cache")
    ids, supervised = text(5, 5)
    whole = cache.sample(5)
    for cut in range(1, len(ids) + 1):
        cache.check_sample(5, ids[:cut], supervised[:cut])
        n = int(supervised[:cut].sum())
        for found, expected in zip(cache.sample(5, ids[:cut], supervised[:cut]), whole, strict=True):
            np.testing.assert_array_equal(found, expected[:n])
    moved, before = supervised.copy(), int(np.flatnonzero(supervised)[0])
    moved[before], moved[int(np.flatnonzero(~supervised)[-1])] = False, True
    for other in ((ids + (np.arange(len(ids)) == 0), supervised), (ids, moved), (ids[::-1], supervised)):
        for method in (cache.sample, cache.check_sample):
            with pytest.raises(ValueError, match="sample 5: the teacher read other tokens .* chat template"):
                method(5, *other)
    with pytest.raises(ValueError, match="sample 2: 1 supervised tokens, training has 5"):
        cache.check_sample(2, ids, supervised)


def test_a_shorter_top_p_sample_ends_at_the_right_entry(tmp_path):
    head = header(top_p=0.9)
    write(tmp_path / "cache", head)
    cache = TeacherCache(tmp_path / "cache")
    ids, supervised = text(5, 5)
    for cut in range(len(ids)):
        n = int(supervised[:cut].sum())
        for found, expected in zip(cache.sample(5, ids[:cut], supervised[:cut]), cache.sample(5), strict=True):
            np.testing.assert_array_equal(found, expected[:n])


def test_another_chat_template_is_noticed(tmp_path):
    """The vocabulary is the same, and so are the answers."""
    record = chat("u:What is the capital?", "a:Paris")
    here, there = (byte_tokenizer(template, eos="<|im_end|>") for template in (CHATML, LLAMA3))
    assert tokenizer_digest(here) == tokenizer_digest(there) and template_digest(here) != template_digest(there)
    one, other = encode(here, record, 64), encode(there, record, 64)
    n = int(one.supervised.sum())
    log_p = np.log(np.full((n, 2), 0.25, np.float32))
    context = context_digests(one.input_ids, one.supervised)
    sample = SampleEntries(np.tile([0, 1], (n, 1)), log_p, np.full(n, 2), np.full(n, 0.5), context)
    cache = CacheWriter(tmp_path / "cache", header(1, k=2), TOKENIZER)
    cache.open()
    cache.append([sample])
    cache.finish()
    cache = TeacherCache(tmp_path / "cache")
    cache.check_sample(0, one.input_ids, one.supervised)
    with pytest.raises(ValueError, match="teacher read other tokens|supervised tokens, training has"):
        cache.check_sample(0, other.input_ids, other.supervised)


def test_check_refuses_what_the_cache_does_not_serve(tmp_path):
    write(tmp_path / "cache", header())
    cache = TeacherCache(tmp_path / "cache")
    cache.check()
    good = dict(data_digest="d" * 64, tokenizer=TOKENIZER, seq_length=32, vocab_size=300)
    cache.check(**good)
    cache.check(**good | dict(seq_length=31, vocab_size=10**6))
    other = SimpleNamespace(get_vocab=lambda: VOCABULARY | {"token 7": 8, "token 8": 7})
    for change, message in (
        (dict(data_digest="e" * 64), r"other data \(SHA-256 dddddddddddd\.\.\., not eeeeeeeeeeee"),
        (dict(tokenizer=other), "vocabularies differ in 2 ids .id 7: 'token 8' here, 'token 7' there"),
        (dict(seq_length=33), "--seq-length 32, training has 33"),
        (dict(vocab_size=299), "token ids up to 299, the student a vocabulary of 299"),
    ):
        with pytest.raises(ValueError, match=f"teacher cache .*{message}") as caught:
            cache.check(**good | change)
        assert "\n" not in str(caught.value)
    (tmp_path / "cache" / "vocabulary.json").unlink()
    with pytest.raises(ValueError, match="vocabulary.json is missing or damaged"):
        cache.check(tokenizer=other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(k=0), "--k: expected 1 to 300"),
        (dict(k=301), "--k: expected 1 to 300"),
        (dict(k=65536, vocab_size=1 << 17), "--k: expected 1 to 65535"),
        (dict(top_p=0.0), "--top-p: expected a mass above 0 and below 1"),
        (dict(top_p=1.0), "--top-p: expected a mass above 0 and below 1"),
        (dict(top_p=float("nan")), "--top-p: expected a mass above 0 and below 1"),
        (dict(dtype="bfloat16"), "--dtype: expected float16 or float32, got 'bfloat16'"),
        (dict(vocab_size=(1 << 24) + 1), "vocabulary size: expected 1 to 16777216"),
    ],
)
def test_impossible_headers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        header(**changes)


def test_a_cache_that_is_older_than_the_date_is_read(tmp_path):
    made_from = dict(data="d", num_samples=0, tokenizer="t", chat_template="c", teacher="t", teacher_files="f")
    old = CacheHeader(**made_from, precision="float32", vocab_size=10, seq_length=4, k=2)
    # What the parts of such a cache carry: computed before there was a date.
    assert old.identity == "54cf6a44c6991fd80c524e1cba09b4d7"
    entries = json.loads(Index(old, True, []).to_json())
    del entries["date"]
    (tmp_path / "cache.json").write_text(json.dumps(entries))
    assert read_index(tmp_path).header == old
    dated = dataclasses.replace(old, date="2020-02-29")
    assert dated.identity != old.identity and dated.differing(old) == ["--data-date"]
    (tmp_path / "cache.json").write_bytes(Index(dated, True, []).to_json())
    assert TeacherCache(tmp_path).header == dated
    with pytest.raises(ValueError, match="was made with --data-date 2020-02-29, training has 2020-03-01"):
        TeacherCache(tmp_path).check(date="2020-03-01")
    TeacherCache(tmp_path).check(date="2020-02-29")
    with pytest.raises(ValueError):
        dataclasses.replace(old, date="soon")


def test_headers_survive_their_file(tmp_path):
    head = header(top_p=0.25, teacher_checkpoint="c", dtype="float32", teacher="é")
    write(tmp_path / "cache", head)
    assert TeacherCache(tmp_path / "cache").header == head
    assert set(json.loads((tmp_path / "cache" / "cache.json").read_text())) == {
        "format", "version", "complete", "parts", *(field.name for field in dataclasses.fields(CacheHeader)),
    }  # fmt: skip
