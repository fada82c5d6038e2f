"""qtarget import-teacher: caches of servers, DistillKit's rows, Megatron-LM's files and other caches, against
transformers' logits."""

import contextlib
import io
import json
import math
import re
import tarfile

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from finetune_runs import SEQ_LENGTH, write_data, write_models
from small_tokenizers import CHATML, byte_tokenizer
from teacher_server import Teacher, served

from qtarget_megatron.commands.import_teacher import main
from qtarget_megatron.data import EncodedSample, JsonlFile, encode_at
from qtarget_megatron.teacher_cache import TeacherCache
from qtarget_megatron.teacher_sources import endpoint
from qtarget_megatron.teacher_sources.source import entries_of

K, SAMPLES, VOCABULARY = 12, 24, 317


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("import-teacher")
    write_models(folder)
    write_data(folder / "train.jsonl", SAMPLES, seed=2)
    return folder


@pytest.fixture(scope="module")
def model(workspace):
    return transformers.AutoModelForCausalLM.from_pretrained(workspace / "teacher", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(workspace):
    file = JsonlFile(workspace / "train.jsonl")
    return [encode_at(file, byte_tokenizer(CHATML, eos="<|im_end|>"), SEQ_LENGTH, i) for i in range(SAMPLES)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(endpoint, "_PAUSE", 0.001)


@contextlib.contextmanager
def printed():
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        yield text


def imported(workspace, out, source, *words, code=0):
    """What is printed."""
    common = ["--hf-model", workspace / "untied", "--data", workspace / "train.jsonl", "--out", out]
    with printed() as text:
        got = main([str(word) for word in (source, *common, "--seq-length", SEQ_LENGTH, *words)])
    assert got == code, text.getvalue()
    return text.getvalue()


def exact(model, sample):
    """log p float64 [n, V] at the supervised tokens."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0].double()
    return torch.log_softmax(logits, -1)[np.flatnonzero(sample.supervised) - 1].numpy()


def assert_is_of(cache, index, sample, log_p, k=K, slack=2e-3):
    """The cache holds the k largest, rounded as float16 of their distance to the largest."""
    ids, got, tail = cache.sample(index, sample.input_ids, sample.supervised)
    order = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(log_p, order, 1)
    assert np.allclose(np.take_along_axis(log_p, ids, 1), best, atol=1e-5), "these are the most likely ones"
    assert np.allclose(got, best, rtol=slack, atol=slack)
    assert np.allclose(tail, 1 - np.exp(best).sum(1), atol=slack)


# ---- servers


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_is_a_teacher(workspace, model, samples, tmp_path, kind):
    teacher = Teacher(model)
    teacher.troubles = ["busy", "gone", "busy"]
    with served(teacher) as url:
        text = imported(workspace, tmp_path / "cache", kind, "--url", f"{url}/v1", "--k", K, "--parallel", 3)
    cache = TeacherCache(tmp_path / "cache")
    assert "of teacher" in text or "teacher: " in text
    assert cache.header.teacher == "teacher" and cache.header.k == K
    for index, sample in enumerate(samples):
        if sample.supervised.any():
            assert_is_of(cache, index, sample, exact(model, sample))
    # Nothing behind the last label is asked for.
    lengths = sorted(len(ids) for ids in teacher.asked)
    assert lengths[-1] == max(np.flatnonzero(s.supervised)[-1] + 1 for s in samples if s.supervised.any())


def test_a_run_that_was_ended_goes_on(workspace, model, samples, tmp_path, monkeypatch):
    """From its last part; complete, it asks nothing."""
    monkeypatch.setattr("qtarget_megatron.teacher_cache.writer._PART_SAMPLES", 5)
    teacher = Teacher(model)
    with served(teacher) as url:
        words = ["--url", url, "--k", K, "--parallel", 1]
        fail_after(teacher, 13)
        text = imported(workspace, tmp_path / "cache", "vllm", *words, code=2)
        assert "400" in text and "the model is full" in text
        asked = len(teacher.asked)
        text = imported(workspace, tmp_path / "cache", "vllm", *words)
        assert re.search(r"going on behind the (5|10) samples", text), text
        assert len(teacher.asked) - asked < SAMPLES + 8
        asked = len(teacher.asked)
        assert "complete already" in imported(workspace, tmp_path / "cache", "vllm", *words)
        assert len(teacher.asked) == asked
        assert "different --k" in imported(workspace, tmp_path / "cache", "vllm", "--url", url, "--k", 3, code=2)
    cache = TeacherCache(tmp_path / "cache")
    for index, sample in enumerate(samples):
        if sample.supervised.any():
            assert_is_of(cache, index, sample, exact(model, sample))


def fail_after(teacher, count):
    """The question behind so many is refused."""
    answer = teacher.log_p

    def log_p(ids):
        if len(teacher.asked) == count:
            teacher.troubles = ["the model is full"]
        return answer(ids)

    teacher.log_p = log_p


def test_a_server_whose_model_changes_is_noticed(workspace, model, tmp_path):
    """Before the cache is complete."""
    other = transformers.AutoModelForCausalLM.from_pretrained(workspace / "untied", dtype=torch.float32).eval()
    teacher = Teacher(model)
    answer = teacher.log_p

    def log_p(ids):
        if len(teacher.asked) > SAMPLES:
            teacher.model = other
        return answer(ids)

    teacher.log_p = log_p
    with served(teacher) as url:
        text = imported(workspace, tmp_path / "cache", "vllm", "--url", url, "--k", K, code=2)
    assert "says something else of sample" in text and "total variation" in text
    with pytest.raises(ValueError, match="is incomplete"):
        TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("words", "prepare", "message"),
    [
        (["--k", 20], dict(max_logprobs=5), r"gave [56] entries of a token of sample \d+, expected 20: start it with"),
        (["--k", 4], dict(key="secret"), "401"),
        (["--k", 4, "--model", "third"], {}, "serves teacher, other, not 'third'"),
        (["--k", 4, "--rows", "x"], {}, "--rows is not of vllm: drop it"),
        (["--k", 4, "--api-key-variable", "QTARGET_NO_SUCH"], {}, "has no QTARGET_NO_SUCH"),
        ([], {}, "--k is missing"),
    ],
)
def test_what_a_server_cannot_give_is_a_line(workspace, model, tmp_path, words, prepare, message):
    teacher = Teacher(model)
    for name, value in prepare.items():
        setattr(teacher, name, value)
    with served(teacher) as url:
        text = imported(workspace, tmp_path / "cache", "vllm", "--url", url, *words, code=2)
    lines = [line for line in text.splitlines() if "error" in line]
    assert len(lines) == 1 and re.search(message, lines[0]), text


def test_a_server_that_is_not_there_is_a_line(workspace, tmp_path):
    text = imported(workspace, tmp_path / "cache", "sglang", "--url", "http://127.0.0.1:9", "--k", 4, code=2)
    assert "http://127.0.0.1:9/get_model_info: " in text and not (tmp_path / "cache").exists()


# ---- files


def rows_of(model, sample):
    """ids and log p [n - 1, K] of each place of a sequence."""
    with torch.no_grad():
        logits = model(torch.from_numpy(sample.input_ids)[None]).logits[0, :-1]
    found = torch.log_softmax(logits.float(), -1).topk(K)
    return found.indices.tolist(), found.values.tolist()


def packed_bits(numbers, bits):
    """Bytes of numbers, highest bit first."""
    text = "".join(format(number, f"0{bits}b") for number in numbers)
    text += "0" * (-len(text) % 8)
    return [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


def compressed(log_p):
    """Four numbers as they are, then a straight line with residuals of 12 bits: of differences."""
    differences = np.diff(np.array(log_p), prepend=0.0)
    line = np.polynomial.polynomial.polyfit(np.arange(K - 4.0), differences[4:], 1).astype(np.float32)
    rest = differences[4:] - (line[0] + line[1] * np.arange(K - 4.0))
    scale = np.float32(np.abs(rest).max() / 2047 or 1)
    steps = np.clip(np.round(rest / scale), -2048, 2047).astype(int) + 2048
    exact_bytes = differences[:4].astype("<f4").tobytes() + line.astype("<f4").tobytes() + scale.tobytes()
    return [*exact_bytes, *packed_bits(steps.tolist(), 12)]


CONFIG = f"""d: {VOCABULARY}
k: {K}
exact_k: 4
exact_dtype: float32
polynomial_terms: [0, 1]
term_dtype: float32
residual_bins:
- {{scale_dtype: float32, element_bits: 12, num_elements: {K - 4}}}
delta_encoding: true
"""


@pytest.mark.parametrize("form", ["plain", "compressed", "packed"])
def test_distillkits_rows_are_found_by_their_tokens(workspace, model, samples, tmp_path, form):
    folder = tmp_path / "rows"
    folder.mkdir()
    table = {"input_ids": []}
    order = np.random.default_rng(0).permutation(SAMPLES).tolist()
    for index in order:
        ids, log_p = rows_of(model, samples[index])
        table["input_ids"].append(samples[index].input_ids[:-1].tolist())
        if form == "plain":
            table.setdefault("token_ids", []).append(ids)
            table.setdefault("top_values", []).append(log_p)
        else:
            table.setdefault("bytepacked_indices", []).append([packed_bits(row, 9) for row in ids])
            table.setdefault("compressed_logprobs", []).append([compressed(row) for row in log_p])
    if form == "packed":
        table = {name: [sum(column[i : i + 3], []) for i in range(0, SAMPLES, 3)] for name, column in table.items()}
        lengths = [len(samples[i].input_ids) - 1 for i in order]
        numbered = [[part % 3 + 1] * length for part, length in enumerate(lengths)]
        table["attention_mask"] = [sum(numbered[i : i + 3], []) for i in range(0, SAMPLES, 3)]
    byte_columns = pyarrow.list_(pyarrow.list_(pyarrow.uint8()))
    columns = {
        name: pyarrow.array(column, byte_columns if name in ("bytepacked_indices", "compressed_logprobs") else None)
        for name, column in table.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), folder / "data_0.parquet", row_group_size=4)
    (folder / "compression_config.yaml").write_text(CONFIG)
    imported(workspace, tmp_path / "cache", "distillkit", "--rows", folder)
    cache = TeacherCache(tmp_path / "cache")
    for index, sample in enumerate(samples):
        if sample.supervised.any():
            assert_is_of(cache, index, sample, exact(model, sample), slack=2e-3 if form == "plain" else 6e-3)
    # Rows of other data.
    write_data(tmp_path / "other.jsonl", 3, seed=9)
    other = ["--data", tmp_path / "other.jsonl"]
    text = imported(workspace, tmp_path / "c2", "distillkit", "--rows", folder, *other, code=2)
    assert re.search(r"record \d: no row has its first \d+ tokens", text), text


def test_distillkits_first_form_is_refused(workspace, tmp_path):
    columns = {name: [[[1]]] for name in ("packed_indices", "exact_values", "coeffs")} | {"input_ids": [[1]]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "old.parquet")
    text = imported(workspace, tmp_path / "cache", "distillkit", "--rows", tmp_path / "old.parquet", code=2)
    assert "logits less their mean" in text


def write_megatron(
    folder, model, samples, *, ranks, micro, per_iteration, form, top_p=None, order=None, length=SEQ_LENGTH
):
    """As LogitsSaverHooks does: samples in MegatronPretrainingSampler's order, padded to one length."""
    folder.mkdir()
    saver = {"k": K, "p": top_p, "min_k": 1, "save_dtype": "fp32"}
    if form == 2:
        saver |= {"mbs_save": micro, "dp_size_save": ranks, "gbs_save": per_iteration}
    meta = json.dumps({"hash": "x", "identifiers": {}, "saver": saver}).encode()
    order = list(range(len(samples))) if order is None else order
    members = {rank: {} for rank in range(ranks)}
    for iteration in range(len(order) // per_iteration):
        chosen = order[iteration * per_iteration : (iteration + 1) * per_iteration]
        batches = {rank: [] for rank in range(ranks)}
        for begin in range(0, per_iteration, micro * ranks):
            for rank in range(ranks):
                own = chosen[begin + rank * micro : begin + (rank + 1) * micro]
                values = torch.full((length, micro, K), -20.0)
                ids = torch.zeros(length, micro, K, dtype=torch.int64)
                for column, index in enumerate(own):
                    row_ids, log_p = (torch.tensor(part)[:length] for part in rows_of(model, samples[index]))
                    values[: len(log_p), column], ids[: len(log_p), column] = log_p, row_ids
                if top_p is not None:
                    masses = values.exp()
                    keep = masses.cumsum(-1) - masses < top_p
                    values, ids = values.masked_fill(~keep, -1e3), ids.masked_fill(~keep, -1)
                    widest = int(keep.sum(-1).max())
                    values, ids = values[..., :widest], ids[..., :widest]
                batches[rank].append((values, (ids & 0xFFFF).to(torch.uint16), (ids >> 16).bool()))
        for rank, parts in batches.items():
            columns = zip(("values", "indices_low", "bit_17"), zip(*parts, strict=True), strict=True)
            if form == 2:
                content = {"format_version": 2}
                content |= {
                    name: torch.cat([c.int() for c in column], 1).to(column[0].dtype)
                    if column[0].dtype == torch.uint16
                    else torch.cat(column, 1)
                    for name, column in columns
                }
            else:
                content = {name: list(column) for name, column in columns}
            buffer = io.BytesIO()
            torch.save(content, buffer)
            members[rank][iteration] = pyarrow.compress(buffer.getvalue(), codec="zstd", asbytes=True)
    for rank, own in members.items():
        with tarfile.open(folder / f"{'cp0_' if form == 1 else ''}dp{rank}__{max(own)}.tar", "w") as tar:
            for name, data in {"_meta.json": meta, **{f"{i}.pt.zst": data for i, data in own.items()}}.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize(
    ("form", "ranks", "micro", "top_p"), [(1, 1, 2, None), (1, 2, 2, None), (2, 3, 1, None), (1, 2, 1, 0.1)]
)
def test_megatrons_files_are_read_in_its_samplers_order(workspace, model, samples, tmp_path, form, ranks, micro, top_p):
    order = np.random.default_rng(3).permutation(SAMPLES).tolist()
    words = dict(ranks=ranks, micro=micro, per_iteration=12, form=form, top_p=top_p, order=order)
    write_megatron(tmp_path / "logits", model, samples, **words)
    (tmp_path / "order").write_text("\n".join(map(str, order)))
    imported(workspace, tmp_path / "cache", "megatron", "--logits", tmp_path / "logits", "--order", tmp_path / "order")
    cache = TeacherCache(tmp_path / "cache")
    assert cache.header.top_p == top_p
    for index, sample in enumerate(samples):
        if not sample.supervised.any():
            continue
        if top_p is None:
            assert_is_of(cache, index, sample, exact(model, sample))
            continue
        ids, got, tail = cache.sample(index, sample.input_ids, sample.supervised)
        log_p = np.sort(exact(model, sample), axis=1)[:, ::-1][:, :K]
        kept = np.exp(log_p).cumsum(1) - np.exp(log_p) < top_p
        assert np.array_equal(ids >= 0, kept) and not kept.all()
        assert np.allclose(got[kept], log_p[kept], atol=2e-3)
        assert np.allclose(tail, 1 - np.where(kept, np.exp(log_p), 0).sum(1), atol=2e-3)


def test_megatrons_files_that_do_not_fit_are_a_line(workspace, model, samples, tmp_path):
    write_megatron(tmp_path / "logits", model, samples, ranks=1, micro=2, per_iteration=12, form=1)
    (tmp_path / "order").write_text("\n".join(str(i) for i in range(2, SAMPLES)))
    logits = ["--logits", tmp_path / "logits"]
    text = imported(workspace, tmp_path / "c1", "megatron", *logits, "--order", tmp_path / "order", code=2)
    assert "record 0 is not among those of --order" in text
    write_megatron(tmp_path / "short", model, samples, ranks=1, micro=2, per_iteration=12, form=1, length=4)
    text = imported(workspace, tmp_path / "c2", "megatron", "--logits", tmp_path / "short", code=2)
    assert "the saved sequences 4: give a smaller --seq-length" in text
    (path,) = (tmp_path / "logits").glob("*.tar")
    path.rename(path.with_name("cp1_dp0__1.tar"))
    assert "context-parallel rank" in imported(workspace, tmp_path / "c3", "megatron", *logits, code=2)
    assert "expected tars" in imported(workspace, tmp_path / "c4", "megatron", "--logits", tmp_path, code=2)


class Knowing:
    """A model that is sure of the token behind each, as a trained one is: of the answers' own places."""

    def __init__(self, vocabulary):
        self.vocabulary = vocabulary

    def __call__(self, ids):
        logits = torch.zeros(1, ids.shape[1], self.vocabulary)
        following = ids[0].roll(-1)
        logits[0, torch.arange(len(following)), following] = 8.0
        return type("Output", (), {"logits": logits})


def test_entries_of_the_place_beside_are_noticed(workspace, tmp_path):
    teacher = Teacher(Knowing(VOCABULARY))
    with served(teacher) as url:
        assert "the kept entries of 100.0%" in imported(workspace, tmp_path / "c1", "sglang", "--url", url, "--k", 2)
        teacher.shift = 1
        text = imported(workspace, tmp_path / "c2", "sglang", "--url", url, "--k", 2, code=2)
    assert re.search(r"the token before a place is among its entries in 100% of \d+ places", text), text


# ---- ensembles


@pytest.mark.parametrize("tail", ["uniform", "drop"])
def test_an_ensemble_is_the_weighted_mean(workspace, model, samples, tmp_path, tail):
    other = transformers.AutoModelForCausalLM.from_pretrained(workspace / "untied", dtype=torch.float32).eval()
    for name, member in (("a", model), ("b", other)):
        with served(Teacher(member)) as url:
            imported(workspace, tmp_path / name, "vllm", "--url", url, "--k", K, "--dtype", "float32")
    words = ["--cache", tmp_path / "a", tmp_path / "b", "--weights", 3, 1, "--tail", tail, "--dtype", "float32"]
    text = imported(workspace, tmp_path / "both", "caches", *words)
    assert "0.75 teacher + 0.25 teacher" in text
    both = TeacherCache(tmp_path / "both")
    for index, sample in enumerate(samples):
        if not sample.supervised.any():
            continue
        mean = np.zeros((int(sample.supervised.sum()), VOCABULARY))
        for weight, member in ((0.75, model), (0.25, other)):
            p = np.exp(exact(member, sample))
            kept = np.zeros_like(p, dtype=bool)
            np.put_along_axis(kept, np.argsort(-p, axis=1)[:, :K], True, 1)
            rest = np.where(kept, 0, p).sum(1, keepdims=True) / (VOCABULARY - K) if tail == "uniform" else 0.0
            mean += weight * np.where(kept, p, rest)
        ids, log_p, rest = both.sample(index, sample.input_ids, sample.supervised)
        got = np.exp(log_p)
        assert np.allclose(got, np.take_along_axis(mean, ids, 1), atol=1e-6)
        # Those that neither cache keeps are not known by name.
        assert np.allclose(rest, 1 - got.sum(1), atol=1e-6) and (got[:, -1] > 0).all()


def test_caches_of_other_data_are_no_ensemble(workspace, model, tmp_path):
    write_data(tmp_path / "other.jsonl", 3, seed=9)
    with served(Teacher(model)) as url:
        imported(workspace, tmp_path / "a", "vllm", "--url", url, "--k", K)
        imported(workspace, tmp_path / "b", "vllm", "--url", url, "--k", K, "--data", tmp_path / "other.jsonl")
    text = imported(workspace, tmp_path / "c", "caches", "--cache", tmp_path / "a", tmp_path / "b", code=2)
    assert "differ in their data" in text
    assert "two caches or more" in imported(workspace, tmp_path / "c", "caches", "--cache", tmp_path / "a", code=2)
    assert math.isfinite(TeacherCache(tmp_path / "a").mean_tail)


@pytest.mark.distributed
@pytest.mark.slow
def test_an_imported_cache_trains_as_the_live_teacher_does(workspace, model, tmp_path):
    """All of the vocabulary is kept, so that nothing but the rounding is between the two."""
    from layout_runs import launch

    with served(Teacher(model, max_logprobs=VOCABULARY)) as url:
        imported(workspace, tmp_path / "cache", "vllm", "--url", url, "--k", VOCABULARY, "--dtype", "float32")
    common = ["--hf-model", workspace / "untied", "--sft-train", workspace / "train.jsonl", "--objective", "kd"]
    runs = {
        "live": [*common, "--teacher-hf", workspace / "teacher"],
        "cached": [*common, "--teacher-cache", tmp_path / "cache"],
    }
    found = launch(1, runs, workspace, 200)
    live, cached = (found[name]["scalars"] for name in ("live", "cached"))
    for tag in ("lm loss", "grad-norm"):
        assert cached[tag] == pytest.approx(live[tag], rel=1e-4), tag


@pytest.mark.parametrize(
    ("ids", "log_p", "message"),
    [
        ([[3, 5]], [[1.5, -2.0]], "expected log-probabilities, 0 or less, got 1.5"),
        ([[3, 5]], [[float("nan"), -2.0]], "expected log-probabilities, 0 or less, got nan"),
        ([[3, 3]], [[-1.0, -2.0]], "comes twice at a place"),
        ([[3, -1]], [[-1.0, -2.0]], "is negative"),
    ],
)
def test_what_are_no_entries_is_a_line(ids, log_p, message):
    sample = EncodedSample(np.arange(4), np.array([False, False, True, False]), truncated=False)
    with pytest.raises(ValueError, match=f"sample 7: .*{message}"):
        entries_of(7, sample, np.array(ids), np.array(log_p))
    # An id that stands where there is no entry is none.
    kept = entries_of(7, sample, np.array([[3, 3]]), np.array([[-1.0, -np.inf]]))
    assert kept.counts.tolist() == [1] and kept.tail[0] == pytest.approx(1 - np.exp(-1), rel=1e-6)
