"""The command cache_teacher: its entries against transformers', at every layout, through an interruption."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import transformers
from conversion_runs import variant
from finetune_runs import write_data, write_models
from launching import REPOSITORY, run_ranks
from megatron_reset import reset
from small_tokenizers import CHATML, LLAMA3, SPECIAL, byte_tokenizer, chat

from qtarget_megatron.data import JsonlFile, encode, load_tokenizer
from qtarget_megatron.resumable import file_digest
from qtarget_megatron.teacher_cache import TeacherCache, writer

# The first test of a launch waits for all of its jobs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

S, K = 32, 8
# float32 sums in another order.
TOLERANCE = 1e-5
# Of float16: half a unit of what lies 12 nats below the top.
HALF = 2**-11 * 12 + TOLERANCE
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
RECORDS = [
    chat("s:Be brief.", "u:Hi", "a:One", "u:And?", "a:Two"),
    chat("u:1 + 1", "a:2"),
    chat("u:What is the capital?", "a: "),  # nothing supervised
    chat("u:é👧", "a:" + "Paris " * 40),  # cut to the sequence length
    chat("u:" + "x" * 100, "a:cut away"),  # nothing supervised is left
]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    write_models(folder)
    write_data(folder / "data.jsonl", 27, seed=3)
    lines = (folder / "data.jsonl").read_text().splitlines()
    special = [json.dumps(record) for record in RECORDS]
    lines = [special[2], *lines[:9], special[0], "", special[1], *lines[9:], *special[3:], special[2]]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "no-json.jsonl").write_text(lines[1] + "\n{'role': 1}\n")
    (folder / "occupied").mkdir()
    (folder / "occupied" / "mine.txt").write_text("mine")
    variant(folder / "untied", folder / "overflow", tensors=lambda w: w["model.norm.weight"].fill_(3e38))
    shutil.copytree(folder / "teacher", folder / "other-tokenizer")
    byte_tokenizer(CHATML, eos="<|im_end|>", special=SPECIAL[::-1]).save_pretrained(folder / "other-tokenizer")
    _write_padded(folder)
    shutil.copytree(folder / "untied", folder / "other-template")
    byte_tokenizer(LLAMA3, eos="<|im_end|>").save_pretrained(folder / "other-template")
    return folder


def _write_padded(folder):
    """A copy of untied with 350 rows in its vocabulary, of which the added ones have the largest logits."""

    def pad(weights):
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            added = weights["lm_head.weight"][:1].repeat(350 - len(weights[name]), 1) * 9
            weights[name] = torch.cat([weights[name], added])

    variant(folder / "untied", folder / "padded", tensors=pad, vocab_size=350)


def run_all(jobs, folder):
    """Run each job, the tool's words, on every rank of this launch: exit code and the tool's own lines."""
    from qtarget_megatron.commands import cache_teacher, convert_hf

    os.chdir(folder)
    results = {}
    for name, words in jobs.items():
        tool = convert_hf if words[0] == "import" else cache_teacher
        printed = io.StringIO()
        small = _small_parts(fail=name == "interrupted") if name in ("interrupted", "resumed") else _nothing()
        if name in ("bad no room", "teacher"):
            # What one entry of each token takes, or less than there could be.
            free = 1000 if name == "bad no room" else 20_000
            small = mock.patch.object(shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), small:
            try:
                code = tool.main([str(word) for word in words])
            except SystemExit as stop:  # argparse
                code = stop.code
            except BaseException as error:
                error.add_note(f"in job {name}; printed:\n{printed.getvalue()[-3000:]}")
                raise
        own = [line for line in printed.getvalue().splitlines() if line.startswith(("cache-teacher", "import"))]
        results[name] = code, "\n".join(own)
        reset()
    return results


def _nothing():
    return contextlib.nullcontext()


@contextlib.contextmanager
def _small_parts(*, fail):
    """Parts of 7 samples; the disk is full at the third."""
    samples, replace, parts = writer._PART_SAMPLES, os.replace, []

    def full(source, target):
        if str(target).endswith(".safetensors"):
            parts.append(target)
        if len(parts) == 3:
            raise OSError(28, "No space left on device")
        replace(source, target)

    writer._PART_SAMPLES = 7
    if fail:
        os.replace = full
    try:
        yield
    finally:
        writer._PART_SAMPLES, os.replace = samples, replace


def job(out, *words, model="untied", data="data.jsonl", k=K):
    return ["--teacher-hf", model, "--data", data, "--out", out, "--seq-length", S, "--k", k, *words]


EXACT = ["--dtype", "float32"]
BAD = {
    "k zero": (["never", "--k", 0], "--k: expected 1 to "),
    "k too large": (["never", "--k", 400], "--k: expected 1 to "),
    "top-p": (["never", "--top-p", 1], "--top-p: expected a mass above 0 and below 1, got 1.0"),
    "dtype": (["never", "--dtype", "bfloat16"], "--dtype: expected float16 or float32, got 'bfloat16'"),
    "too long": (["never", "--seq-length", 65], "--seq-length: expected 1 to 64"),
    "no data": (["never", "--data", "absent.jsonl"], "absent.jsonl"),
    "no json": (["never", "--data", "no-json.jsonl"], "no-json.jsonl:2: expected JSON"),
    "no model": (["never", "--teacher-hf", "absent"], "absent"),
    "no checkpoint": (["never", "--load", "untied"], "latest_checkpointed_iteration.txt"),
    "no folder": (["none/never"], "there is no directory none: create it"),
    "occupied": (["occupied"], "occupied holds 'mine.txt' and no teacher cache"),
    "a file": (["data.jsonl"], "data.jsonl is a file: expected a directory"),
    "other k": (["one", *EXACT, "--k", 9], "one holds a cache with a different --k: choose another directory"),
    "other model": (["one", *EXACT, "--teacher-hf", "teacher"], "a different teacher: choose"),
    "student's tokenizer": (["never", "--student-hf", "other-tokenizer"], "vocabularies differ"),
    "context parallel": (["never", "--context-parallel-size", 2], "multiple of 2 processes"),
    "no room": (["no-room", "--top-p", 0.9], "GB of free disk space for what is to be written, found 0.0 GB"),
    "nan": (["nan", "--teacher-hf", "overflow"], "data.jsonl:2: the logits of supervised token 0 are not finite"),
}


def launch(world_size, workspace, jobs):
    jobs = {name: [str(word) for word in words] for name, words in jobs.items()}
    return run_ranks(world_size, run_all, (jobs, str(workspace)), timeout=420, megatron=True)


@pytest.fixture(scope="module")
def one(workspace):
    return launch(
        1,
        workspace,
        {
            "one": job("one", *EXACT),
            "again": job("one", *EXACT, "--micro-batch-size", 3),
            "half": job("half", "--micro-batch-size", 7),
            "teacher": job("teacher-cache", "--top-p", 0.2, "--micro-batch-size", 4, model="teacher", k=40),
            "import": ["import", "--hf-model", "untied", "--save", "ckpt"],
            "load": job("load", *EXACT, "--load", "ckpt", model="overflow"),
            "bf16": job("bf16", "--bf16", "--micro-batch-size", 4),
            "padded": job("padded-cache", *EXACT, "--student-hf", "untied", model="padded"),
            "template": job("template-cache", *EXACT, "--student-hf", "other-template"),
            "interrupted": job("interrupted", *EXACT),
            **{f"bad {name}": job(*words) for name, (words, _) in BAD.items()},
        },
    )[0]


@pytest.fixture(scope="module")
def four(workspace, one):
    return launch(
        4,
        workspace,
        {
            "tp2-pp2": job("tp2-pp2", *EXACT, *TP2, *PP2, "--sequence-parallel", "--micro-batch-size", 2),
            "dp2-pp2-vpp2": job(
                "dp2-pp2-vpp2", *EXACT, *PP2, "--num-virtual-stages-per-pipeline-rank", 2, "--micro-batch-size", 3
            ),
            "dp2-tp2": job("dp2-tp2", *TP2, "--micro-batch-size", 3),
            "teacher": job("teacher-tp4", "--tensor-model-parallel-size", 4, "--top-p", 0.2, model="teacher", k=40),
            "resumed": job("interrupted", *EXACT, *TP2, "--micro-batch-size", 2),
        },
    )


# ---- the numbers


@pytest.fixture(scope="module")
def log_p(workspace):
    """By transformers, one sample at a time: model -> [log softmax at the supervised tokens, float64 [n, V]]."""
    file = JsonlFile(workspace / "data.jsonl")
    samples = [encode(load_tokenizer(workspace / "untied"), file.record(i), S) for i in range(len(file))]
    return {name: [_log_p(model, sample) for sample in samples] for name, model in models(workspace).items()}


def models(workspace):
    load = transformers.AutoModelForCausalLM.from_pretrained
    return {name: load(workspace / name, dtype=torch.float64).eval() for name in ("untied", "teacher")}


@torch.no_grad()
def _log_p(model, sample):
    rows = model(torch.from_numpy(sample.input_ids)[None, :-1]).logits[0].log_softmax(-1)
    return rows[torch.from_numpy(sample.supervised[1:])].numpy()


def assert_entries(directory, expected, *, k=K, top_p=None, tolerance=TOLERANCE, rounding=0.0):
    """Every kept entry has its token's log p, and they are the largest, in order (equal ones in any)."""
    cache = TeacherCache(directory)
    assert len(cache) == len(expected) == 33 and sum(len(rows) == 0 for rows in expected) == 3
    for index, rows in enumerate(expected):
        ids, found, tail = cache.sample(index)
        assert ids.shape == found.shape == (len(rows), k)
        kept = ids >= 0
        ordered = -np.sort(-rows)[:, :k]
        counts = kept.sum(-1)
        assert (kept == (np.arange(k) < counts[:, None])).all() and all(
            len(set(row[row >= 0])) == count for row, count in zip(ids, counts, strict=True)
        )
        np.testing.assert_allclose(found[kept], ordered[kept], rtol=0, atol=tolerance + rounding)
        own = np.take_along_axis(rows, ids.clip(0), axis=1)
        np.testing.assert_allclose(own[kept], ordered[kept], rtol=0, atol=2 * tolerance)
        mass = np.exp(np.where(kept, ordered, -np.inf)).sum(-1)
        np.testing.assert_allclose(tail, 1 - mass, rtol=0, atol=tolerance)
        if top_p is None:
            assert kept.all()
        else:
            before = mass - np.take_along_axis(np.exp(ordered), counts[:, None] - 1, axis=1)[:, 0]
            assert (before < top_p + tolerance).all()
            assert ((mass > top_p - tolerance) | (counts == k)).all()


def assert_same(one, other, *, unit=0.0):
    """Two caches hold the same entries; tokens closer than the rounding of sums may have changed places.

    unit: of the rounding of log p, relative to its distance from the top.
    """
    one, other = TeacherCache(one), TeacherCache(other)
    places = changed = 0
    for index in range(len(one)):
        (ids, log_p, tail), (ids_there, log_p_there, tail_there) = one.sample(index), other.sample(index)
        assert (np.abs(log_p - log_p_there) <= TOLERANCE + unit * (log_p[:, :1] - log_p)).all()
        np.testing.assert_allclose(tail, tail_there, rtol=0, atol=TOLERANCE)
        places, changed = places + ids.size, changed + (ids != ids_there).sum()
    assert changed <= places // 500, f"{changed} of {places} ids differ"


def test_one_process_finds_what_transformers_finds(workspace, one, log_p):
    for name in ("one", "half", "teacher", "load"):
        assert one[name][0] == 0, one[name]
    assert_entries(workspace / "one", log_p["untied"])
    assert_entries(workspace / "load", log_p["untied"])
    assert_entries(workspace / "half", log_p["untied"], rounding=HALF)
    assert_entries(workspace / "teacher-cache", log_p["teacher"], k=40, top_p=0.2, rounding=HALF)
    cache = TeacherCache(workspace / "teacher-cache")
    counts = np.concatenate([(cache.sample(i)[0] >= 0).sum(-1) for i in range(len(cache))])
    assert len(set(counts.tolist())) > 5, "top-p keeps different numbers"


@pytest.mark.parametrize("name", ["tp2-pp2", "dp2-pp2-vpp2"])
def test_every_layout_writes_the_same_entries(workspace, four, log_p, name):
    assert [result[name][0] for result in four] == [0] * 4, four
    assert_entries(workspace / name, log_p["untied"])
    assert_same(workspace / "one", workspace / name)


def test_layouts_agree_in_float16_and_with_top_p(workspace, four, log_p):
    assert [result[name][0] for result in four for name in ("dp2-tp2", "teacher")] == [0] * 8, four
    assert_same(workspace / "half", workspace / "dp2-tp2", unit=2**-10)
    assert_entries(workspace / "dp2-tp2", log_p["untied"], rounding=HALF)
    assert_entries(workspace / "teacher-tp4", log_p["teacher"], k=40, top_p=0.2, rounding=HALF)


def test_half_precision_of_the_teacher_is_used_when_asked_for(workspace, one, log_p):
    assert one["bf16"][0] == 0, one["bf16"]
    cache, exact = TeacherCache(workspace / "bf16"), TeacherCache(workspace / "half")
    differences = [np.abs(cache.sample(i)[1] - exact.sample(i)[1]).max(initial=0) for i in range(len(cache))]
    assert 2e-2 < max(differences) < 0.5
    assert cache.header.precision == "--bf16"


def test_padding_that_only_the_teacher_has_gets_no_mass(workspace, one, log_p):
    """Its rows would come first by far."""
    assert one["padded"][0] == 0, one["padded"]
    assert_entries(workspace / "padded-cache", log_p["untied"])
    TeacherCache(workspace / "padded-cache").check(vocab_size=log_p["untied"][1].shape[1])


# ---- the cache in training


@pytest.mark.parametrize("seq_length", [S, 12])
@pytest.mark.parametrize("name", ["half", "tp2-pp2"])
def test_training_finds_its_samples(workspace, one, four, name, seq_length):
    cache = TeacherCache(workspace / name)
    file, tokenizer = JsonlFile(workspace / "data.jsonl"), load_tokenizer(workspace / "untied")
    digest = file_digest(workspace / "data.jsonl")
    cache.check(data_digest=digest, tokenizer=tokenizer, seq_length=seq_length)
    total = 0
    for index in range(len(file)):
        sample = encode(tokenizer, file.record(index), seq_length)
        cache.check_sample(index, sample.input_ids, sample.supervised)
        ids, log_p, tail = cache.sample(index, sample.input_ids, sample.supervised)
        assert len(ids) == len(log_p) == len(tail) == sample.supervised.sum()
        np.testing.assert_array_equal(ids, cache.sample(index)[0][: len(ids)])
        total += len(ids)
    assert total == cache.num_tokens if seq_length == S else 0 < total < cache.num_tokens
    with pytest.raises(ValueError, match="--seq-length 32, training has 33"):
        cache.check(seq_length=S + 1)
    with pytest.raises(ValueError, match="vocabularies differ"):
        cache.check(tokenizer=load_tokenizer(workspace / "other-tokenizer"))


def test_the_student_s_chat_template_is_what_the_teacher_reads(workspace, one):
    assert one["template"][0] == 0, one["template"]
    file, tokenizer = JsonlFile(workspace / "data.jsonl"), load_tokenizer(workspace / "other-template")
    sample = encode(tokenizer, file.record(1), S)
    TeacherCache(workspace / "template-cache").check_sample(1, sample.input_ids, sample.supervised)
    with pytest.raises(ValueError, match="sample 1: the teacher read other tokens|supervised tokens, training has"):
        TeacherCache(workspace / "one").check_sample(1, sample.input_ids, sample.supervised)


# ---- the tool


def test_what_is_printed(workspace, one):
    lines = one["one"][1].splitlines()
    cache = TeacherCache(workspace / "one")
    assert lines[0].endswith("data.jsonl: 33 samples, 3 truncated to 32 tokens, 3 without a supervised token")
    assert f"cache-teacher: {cache.num_tokens} supervised tokens of 56 bytes" in lines[1]
    assert "cache-teacher: 33/33 samples" in lines[-2] and "0:00:00 left" in lines[-2]
    assert f"33 samples, {cache.num_tokens} supervised tokens, 8.0 entries each" in lines[-1]
    assert f"mean tail {cache.mean_tail:.4f}" in lines[-1] and 0.05 < cache.mean_tail < 0.95
    assert "teacher-cache: up to 0.0 GB will be written, there are 0.0 GB of free" in one["teacher"][1]
    assert one["again"][0] == 0 and "one is complete already, made from the same inputs" in one["again"][1]


def test_an_interrupted_run_goes_on_at_another_layout(workspace, one, four):
    code, printed = one["interrupted"]
    assert code == 2
    assert "error: interrupted: No space left on device; run again to go on from here" in printed
    assert [result["resumed"][0] for result in four] == [0] * 4
    assert "going on behind the 14 samples that are cached already" in four[0]["resumed"][1]
    assert_same(workspace / "one", workspace / "interrupted")


def test_bad_input_is_one_line_and_writes_nothing(workspace, one):
    for name, (_, message) in BAD.items():
        code, printed = one[f"bad {name}"]
        assert code == 2, (name, code, printed)
        errors = [text for text in printed.splitlines() if "error: " in text]
        assert len(errors) == 1 and message in errors[0], (name, printed)
    assert not (workspace / "never").exists()
    assert sorted(path.name for path in (workspace / "occupied").iterdir()) == ["mine.txt"]
    with pytest.raises(ValueError, match="is incomplete, with 0 of 33 samples"):
        TeacherCache(workspace / "nan")


def test_help_explains_without_a_model():
    command = [sys.executable, str(REPOSITORY / "tools" / "cache_teacher.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0
    for piece in ("--teacher-hf", "--top-p", "--student-hf", "torchrun", "Bytes per token", "5 k + 12", "tail"):
        assert piece in result.stdout
