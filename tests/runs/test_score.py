"""The command score: its numbers against transformers', at every layout, through an interruption and into the data."""

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace
from unittest import mock

import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from checkpoint_models import edit_json
from conversion_runs import variant
from finetune_runs import COMMON, scalars, vocabulary, write_data, write_model, write_models
from launching import REPOSITORY, run_alone, run_ranks, run_torchrun
from megatron_reset import reset
from row_data import padded_rows, sizes_of
from small_tokenizers import CHATML, SPECIAL, byte_tokenizer, chat

from qtarget_megatron.data import JsonlFile, encode, load_tokenizer
from qtarget_megatron.data.side_inputs import batch_key
from qtarget_megatron.megatron.jobs import score as scoring

# The first test of a launch waits for all of its jobs.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(900)]

S = 32
# As in test_conversion.py: float32 from transformers in float64.
TOLERANCE = 1e-5
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
VPP2 = ["--num-virtual-stages-per-pipeline-rank", 2]
REFERENCE = ["--reference-hf", "teacher"]

RECORDS = [
    chat("s:Be brief.", "u:Hi", "a:One", "u:And?", "a:Two"),
    chat("u:1 + 1", "a:2") | {"id": 7, "nested": {"a": [1, 2.5]}},
    chat("u:What is the capital?", "a: "),  # nothing supervised
    chat("u:é👧", "a:" + "Paris " * 40),  # cut to the sequence length
    chat("u:" + "x" * 100, "a:cut away"),  # nothing supervised is left
]
# How it is written must come through: blanks, escapes, a number with a zero at its end, a key given twice.
QUESTION = '{"role":"user","content":"a\\u00e9"}'
ODD = f'  {{"messages":[{QUESTION},   {{"role": "assistant","content":"b"}}],  "x": 1.50, "x": 1.50 }}  '
# One has a weight that scoring does not read.
FORMS = {
    "prompt": {"prompt": "1 + 1 =", "completion": " 2"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "é", "weight": 0.5}]},
    "alpaca": {"instruction": "1 + 1", "input": None, "output": "2"},
    "tokens": {"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8]},
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("score")
    write_models(folder)
    # Its logits are not the products of its output layer.
    scaled = dict(hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, logits_scaling=1.3)
    scaled |= dict(
        vocab_size=vocabulary(), max_position_embeddings=64, residual_multiplier=0.7, attention_multiplier=0.3
    )
    shutil.rmtree(folder / "teacher")
    write_model(folder / "teacher", "Granite", scaled, torch.Generator().manual_seed(3))
    lines = conversations(folder / "many.jsonl", 900, seed=3)[:36]
    special = [json.dumps(record, ensure_ascii=False) for record in RECORDS]
    # The first and the last record have no supervised token.
    lines = [special[2], *lines[:9], special[0], "", special[1], ODD, *lines[9:], special[3], special[4], special[2]]
    (folder / "train.jsonl").write_text("\n".join(lines))
    (folder / "tables").mkdir()
    records = [json.loads(line) for line in lines if line]
    for name, part in (("a", records[:20]), ("b", records[20:])):
        pyarrow.parquet.write_table(pyarrow.Table.from_struct_array(pyarrow.array(part)), folder / "tables" / name)
    scored = json.dumps(chat("u:a", "a:b") | {"old_log_prob": [3]})
    (folder / "has-field.jsonl").write_text(f"{lines[1]}\n{scored}\n")
    for form, record in FORMS.items():
        (folder / f"{form}.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    (folder / "mixed.jsonl").write_text(f"{lines[1]}\n{json.dumps(FORMS['alpaca'])}\n")
    stale = {"prompt": "a", "completion": "b", "weight": "stale", "note": "n", "old_log_prob": None}
    (folder / "stale.jsonl").write_text("".join(json.dumps(stale | {"completion": c}) + "\n" for c in ("b", " ")))
    (folder / "no-json.jsonl").write_text(lines[1] + "\n{'role': 1}\n")
    (folder / "empty.jsonl").write_text("\n")
    variant(folder / "untied", folder / "broken", tensors=lambda w: w["model.norm.weight"].fill_(torch.nan))
    variant(folder / "untied", folder / "overflow", tensors=lambda w: w["model.norm.weight"].fill_(3e38))
    shutil.copytree(folder / "teacher", folder / "larger-vocabulary")
    edit_json(folder / "larger-vocabulary" / "config.json", vocab_size=400)
    shutil.copytree(folder / "teacher", folder / "other-tokenizer")
    byte_tokenizer(CHATML, eos="<|im_end|>", special=SPECIAL[::-1]).save_pretrained(folder / "other-tokenizer")
    (folder / "occupied.jsonl").write_text("mine")
    return folder


def conversations(path, count, seed):
    """A file of random conversations without side inputs; its lines."""
    write_data(path, count, seed)
    lines = [json.dumps({"messages": record["messages"]}) for record in read(path)]
    path.write_text("\n".join(lines) + "\n")
    return lines


def run_all(jobs, folder):
    """Run each job, (tool, its words...), on every rank of this launch: exit code and the tool's own lines."""
    from qtarget_megatron import finetune
    from qtarget_megatron.commands import convert_hf, score

    tools = {"score": score, "convert": convert_hf, "finetune": finetune}
    os.chdir(folder)
    os.environ["QTARGET_CACHE_DIR"] = str(folder) + "/cache"
    results = {}
    for name, (tool, *words) in jobs.items():
        printed = io.StringIO()
        no_room = mock.patch.object(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5000))
        small_disk = no_room if name == "bad no room" else contextlib.nullcontext()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed), small_disk:
            try:
                code = tools[tool].main([str(word) for word in words])
            except SystemExit as stop:  # argparse
                code = stop.code
            except BaseException as error:
                error.add_note(f"in job {name}; printed:\n{printed.getvalue()[-3000:]}")
                raise
        # argparse's own refusals begin with the command.
        own = ("score", "import", "export", "finetune", "qtarget")
        results[name] = code, "\n".join(line for line in printed.getvalue().splitlines() if line.startswith(own))
        reset()
    return results


def job(out, *words, model="untied", data="train.jsonl"):
    return ["score", "--hf-model", model, "--data", data, "--out", out, "--seq-length", S, *words]


def launch(world_size, workspace, jobs):
    jobs = {name: [str(word) for word in words] for name, words in jobs.items()}
    return run_ranks(world_size, run_all, (jobs, str(workspace)), timeout=420, megatron=True)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


# ---- runs


BAD = {
    "data is out": (["train.jsonl"], "train.jsonl is the input, which would be lost"),
    "data is partial": (["train.jsonl.partial", "--out", "train.jsonl"], "is the input, which would be lost"),
    "out in data": (["tables/o.jsonl", "--data", "tables"], "--out tables/o.jsonl would be a file of --data tables"),
    "out exists": (["occupied.jsonl"], "exists already: give --overwrite"),
    "no folder": (["none/o.jsonl"], "there is no directory none"),
    "no data": (["o.jsonl", "--data", "absent.jsonl"], "absent.jsonl"),
    "no json": (["o.jsonl", "--data", "no-json.jsonl"], "no-json.jsonl:2: expected JSON"),
    "another form": (["o.jsonl", "--data", "mixed.jsonl"], "mixed.jsonl:2: record: expected the form messages, "),
    "asked form": (["o.jsonl", "--data-format", "tokens"], "train.jsonl:1: record: expected the form tokens, "),
    "field exists": (["o.jsonl", "--data", "has-field.jsonl"], 'field.jsonl:2: the record has "old_log_prob" already'),
    "no model": (["o.jsonl", "--hf-model", "absent"], "absent"),
    "no reference": (["o.jsonl", "--reference-hf", "absent"], "absent"),
    "no checkpoint": (["o.jsonl", "--load", "untied"], "latest_checkpointed_iteration.txt"),
    "too long": (["o.jsonl", "--seq-length", 65], "--seq-length: expected 1 to 64"),
    "length zero": (["o.jsonl", "--seq-length", 0], "--seq-length: expected 1 to 64"),
    "processes": (["o.jsonl", *TP2], "--nproc-per-node 2"),
    "heads": (["o.jsonl", "--tensor-model-parallel-size", 3], "3 does not divide the 4 attention heads"),
    "save": (["o.jsonl", "--save", "x"], "--save has no meaning"),
    "no room": (["o.jsonl"], "GB of free disk space for what is to be written, found 0.0 GB"),
    "architecture flag": (["o.jsonl", "--num-layers", 2], "--num-layers follow"),
    "reference's vocabulary": (["o.jsonl", "--reference-hf", "larger-vocabulary"], "embed_tokens"),
    "reference's tokenizer": (["o.jsonl", "--reference-hf", "other-tokenizer"], "vocabularies differ"),
    "weight limit": (["o.jsonl", *REFERENCE, "--max-weight", 0], "above 0, got 0.0"),
    "temperature": (["o.jsonl", *REFERENCE, "--temp", "nan"], "expected a finite number, got nan"),
    "temperature without reference": (["o.jsonl", "--temp", 2], "--temp belongs to the weight"),
    "broken weights": (["o.jsonl", "--hf-model", "broken"], "got NaN or infinity in model.norm.weight"),
    "nan": (["nan.jsonl", "--hf-model", "overflow"], "log p of supervised token 0 is nan under --hf-model overflow"),
    "reference nan": (["nan2.jsonl", "--reference-hf", "overflow"], "is nan under --reference-hf overflow"),
}  # fmt: skip


@pytest.fixture(scope="module")
def one(workspace):
    training = ["finetune", *COMMON, "--hf-model", "untied", "--sft-train", "one.jsonl", "--train-iters", 1]
    training += ["--global-batch-size", 40, "--micro-batch-size", 8]
    return launch(
        1,
        workspace,
        {
            "reference": job("one.jsonl", *REFERENCE),
            "options": job("options.jsonl", *REFERENCE, "--temp", -3, "--max-weight", 1.25, "--micro-batch-size", 7),
            "tied": job("tied.jsonl", "--micro-batch-size", 4, model="tied"),
            "import": ["convert", "import", "--hf-model", "untied", "--save", "ckpt"],
            "load": job("load.jsonl", "--load", "ckpt", model="overflow"),
            "bf16": job("bf16.jsonl", "--bf16", *REFERENCE),
            "overwrite": job("stale-out.jsonl", "--overwrite", *REFERENCE, data="stale.jsonl"),
            "keep": job("stale-kept.jsonl", "--overwrite", data="stale.jsonl"),
            "tables": job("tables-out.jsonl", data="tables"),
            "empty": job("empty-out.jsonl", data="empty.jsonl"),
            **{form: job(f"{form}-out.jsonl", "--data-format", form, data=f"{form}.jsonl") for form in FORMS},
            "psft": [
                *training,
                "--objective",
                "psft",
                "--objective-args",
                "refresh=0",
                "--tensorboard-dir",
                "board-psft",
            ],
            "weighted-sft": [*training, "--objective", "weighted-sft", "--tensorboard-dir", "board-weighted-sft"],
            **{f"bad {name}": job(*words) for name, (words, _) in BAD.items()},
        },
    )[0]


@pytest.fixture(scope="module")
def two(workspace):
    return launch(
        2,
        workspace,
        {
            "tables": job("tables-out2.jsonl", data="tables"),
            "dp2": job("dp2.jsonl", *REFERENCE, "--micro-batch-size", 3),
            "tp2": job("tp2.jsonl", *REFERENCE, *TP2, "--sequence-parallel"),
            "pp2-vpp2": job("pp2-vpp2.jsonl", *PP2, *VPP2, "--micro-batch-size", 2),
            "tied": job("tied-pp2.jsonl", *PP2, model="tied"),
            "import": ["convert", "import", "--hf-model", "untied", "--save", "ckpt2", *PP2],
            "load": job("load2.jsonl", "--load", "ckpt2", *TP2, *REFERENCE, model="overflow"),
            "bad field": job("never.jsonl", data="has-field.jsonl"),
            "odd length": job("never.jsonl", *TP2, "--sequence-parallel", "--seq-length", 33),
        },
    )


@pytest.fixture(scope="module")
def four(workspace):
    return launch(
        4,
        workspace,
        {
            "tp2-pp2": job("tp2-pp2.jsonl", *REFERENCE, *TP2, *PP2, "--micro-batch-size", 2),
            "dp4": job("dp4.jsonl", *REFERENCE),
        },
    )


@pytest.fixture(scope="module")
def log_p(workspace):
    """By transformers, one sample at a time: model -> [log p of the supervised tokens, float64, for each record]."""
    tokenizer = load_tokenizer(workspace / "untied")
    records = read(workspace / "train.jsonl")
    return {name: [_log_p(model, tokenizer, record) for record in records] for name, model in _models(workspace)}


def _models(workspace):
    for name in ("untied", "tied", "teacher"):
        yield (
            name,
            transformers.AutoModelForCausalLM.from_pretrained(workspace / name, dtype=torch.float64).eval(),
        )


@torch.no_grad()
def _log_p(model, tokenizer, record):
    sample = encode(tokenizer, record, S)
    ids = torch.from_numpy(sample.input_ids)
    rows = model(ids[None, :-1]).logits[0].log_softmax(-1)
    return rows[torch.arange(len(ids) - 1), ids[1:]][sample.supervised[1:]]


# ---- the numbers


def assert_scores(path, expected, reference=None, tolerance=TOLERANCE, temp=1.0, maximum=16.0):
    records = read(path)
    assert len(records) == len(expected) == 43
    for i, (record, wanted) in enumerate(zip(records, expected, strict=True)):
        assert record["old_log_prob"] == pytest.approx(wanted.tolist(), rel=0, abs=tolerance), i
        if reference is None or len(wanted) == 0:
            assert "weight" not in record, i
        else:
            weight = (temp * (wanted - reference[i]).mean()).exp().clamp(0, maximum).item()
            assert record["weight"] == pytest.approx(weight, rel=4 * tolerance), i


def test_one_process_scores_like_transformers(workspace, one, log_p):
    for name in ("reference", "options", "tied", "load"):
        assert one[name][0] == 0, one[name]
    assert_scores(workspace / "one.jsonl", log_p["untied"], log_p["teacher"])
    assert_scores(workspace / "options.jsonl", log_p["untied"], log_p["teacher"], temp=-3, maximum=1.25)
    assert_scores(workspace / "tied.jsonl", log_p["tied"])
    assert_scores(workspace / "load.jsonl", log_p["untied"])
    weights = [record["weight"] for record in read(workspace / "options.jsonl") if "weight" in record]
    assert 1.25 in weights and min(weights) < 1.25, "both sides of the clamp are met"
    counts = [len(values) for values in log_p["untied"]]
    assert counts[0] == counts[-1] == counts[-2] == 0 and counts[-3] > 15


@pytest.mark.parametrize(
    ("name", "file", "model", "reference"),
    [
        ("dp2", "dp2.jsonl", "untied", "teacher"),
        ("tp2", "tp2.jsonl", "untied", "teacher"),
        ("pp2-vpp2", "pp2-vpp2.jsonl", "untied", None),
        ("tied", "tied-pp2.jsonl", "tied", None),
        ("load", "load2.jsonl", "untied", "teacher"),
    ],
)
def test_two_ranks_write_the_same_numbers_in_the_same_order(workspace, two, log_p, name, file, model, reference):
    assert [result[name][0] for result in two] == [0, 0], two
    assert_scores(workspace / file, log_p[model], log_p.get(reference))


@pytest.mark.parametrize("name", ["tp2-pp2", "dp4"])
def test_four_ranks_write_the_same_numbers_in_the_same_order(workspace, four, one, log_p, name):
    assert [result[name][0] for result in four] == [0] * 4, four
    assert_scores(workspace / f"{name}.jsonl", log_p["untied"], log_p["teacher"])
    for ours, single in zip(read(workspace / f"{name}.jsonl"), read(workspace / "one.jsonl"), strict=True):
        assert ours.pop("old_log_prob") == pytest.approx(single.pop("old_log_prob"), rel=0, abs=TOLERANCE)
        assert ours.pop("weight", 0) == pytest.approx(single.pop("weight", 0), rel=TOLERANCE)
        assert ours == single


def test_half_precision_is_used_when_asked_for(workspace, one, log_p):
    assert one["bf16"][0] == 0, one["bf16"]
    assert_scores(workspace / "bf16.jsonl", log_p["untied"], log_p["teacher"], tolerance=0.25)
    found = [value for record in read(workspace / "bf16.jsonl") for value in record["old_log_prob"]]
    exact = [value for record in read(workspace / "one.jsonl") for value in record["old_log_prob"]]
    assert max(abs(a - b) for a, b in zip(found, exact, strict=True)) > 1e-3


# ---- the file


def test_every_line_comes_back_unchanged_but_for_the_fields(workspace, one):
    before = [line.strip() for line in (workspace / "train.jsonl").read_text().splitlines() if line.strip()]
    after = (workspace / "one.jsonl").read_text().splitlines()
    assert len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert new.startswith(old[:-1].rstrip() + ', "old_log_prob": [')
        assert set(json.loads(new)) - set(json.loads(old)) <= {"old_log_prob", "weight"}
    assert sum(json.loads(line)["old_log_prob"] == [] for line in after) == 3


@pytest.mark.parametrize("form", FORMS)
def test_the_scored_file_has_the_form_of_the_data(workspace, one, form):
    assert one[form][0] == 0, one[form]
    (scored,) = read(workspace / f"{form}-out.jsonl")
    (name, model), *_ = _models(workspace)
    expected = _log_p(model, load_tokenizer(workspace / name), FORMS[form])
    assert len(expected) >= 2
    assert scored.pop("old_log_prob") == pytest.approx(expected.tolist(), rel=0, abs=TOLERANCE)
    assert scored == FORMS[form]


def test_tables_come_back_as_json_lines(workspace, one, two, log_p):
    """A row's fields that are null belong to other rows."""
    assert [result["tables"][0] for result in (one, *two)] == [0] * 3, (one["tables"], two)
    before = read(workspace / "train.jsonl")
    for name in ("tables-out.jsonl", "tables-out2.jsonl"):
        assert_scores(workspace / name, log_p["untied"])
        for old, new in zip(before, read(workspace / name), strict=True):
            assert {key: value for key, value in new.items() if key != "old_log_prob"} == old


def test_numbers_restore_every_bit_of_float32(workspace, one, log_p):
    values = [value for record in read(workspace / "one.jsonl") for value in record["old_log_prob"]]
    assert len(values) == sum(map(len, log_p["untied"]))
    assert any(len(str(value).lstrip("-")) >= 10 for value in values), "nine significant digits"
    for value in values[:50]:
        assert float(f"{value:.9g}") == value


@pytest.mark.parametrize("seq_length", [S, 12])
def test_training_reads_the_written_file(workspace, one, seq_length):
    file, tokenizer = JsonlFile(workspace / "one.jsonl"), load_tokenizer(workspace / "untied")
    names = ("old_log_prob", "weight")
    supervised = sizes_of(file, tokenizer, seq_length, names).supervised
    assert (supervised == 0).sum() >= 3
    num_rows = int((supervised > 0).sum())
    data = padded_rows(file, tokenizer, seq_length, num_rows=num_rows, shuffle=False, names=names)
    for i in range(len(data)):
        item = data[i]
        record = file.record(int(item["sample"]))
        supervised = item["labels"] != -100
        count = int(supervised.sum())
        assert item[batch_key("old_log_prob")][supervised].tolist() == record["old_log_prob"][:count]
        assert item[batch_key("weight")][supervised].tolist() == [record["weight"]] * count
        assert not item[batch_key("weight")][~supervised].any()
    if seq_length == S:
        with pytest.raises(ValueError, match='"old_log_prob": expected a number or .* numbers .*, got'):
            sizes_of(file, tokenizer, 2 * S, names)


def test_training_starts_from_the_scored_model(workspace, one, log_p):
    """Before the first step p(y) is p_old(y): psft's ratio is 1 for every token, so that its loss is -1."""
    assert one["psft"][0] == one["weighted-sft"][0] == 0, (one["psft"], one["weighted-sft"])
    assert scalars(workspace / "board-psft")["lm loss"] == pytest.approx([-1], abs=1e-5)
    # The batch is the whole file: 40 samples have supervised tokens.
    records = read(workspace / "one.jsonl")
    total = sum(-record["weight"] * p.sum() for record, p in zip(records, log_p["untied"], strict=True) if len(p))
    mean = total.item() / sum(map(len, log_p["untied"]))
    assert scalars(workspace / "board-weighted-sft")["lm loss"] == pytest.approx([mean], rel=1e-5)


def test_stale_fields_are_replaced_on_request(workspace, one):
    assert one["overwrite"][0] == one["keep"][0] == 0, (one["overwrite"], one["keep"])
    scored, empty = read(workspace / "stale-out.jsonl")
    assert scored["note"] == "n" and len(scored["old_log_prob"]) == 2 and 0 < scored["weight"] < 16
    assert empty == {"prompt": "a", "completion": " ", "note": "n", "old_log_prob": []}
    # Without a reference, weight is a field like any other.
    assert [record["weight"] for record in read(workspace / "stale-kept.jsonl")] == ["stale", "stale"]


def test_a_file_without_records_gives_one(workspace, one):
    assert one["empty"][0] == 0, one["empty"]
    assert (workspace / "empty-out.jsonl").read_text() == ""


# ---- errors


def test_bad_input_is_one_line_and_writes_nothing(workspace, one, two):
    for name, (_, message) in BAD.items():
        code, line = one[f"bad {name}"]
        assert code == 2, (name, code, line)
        errors = [text for text in line.splitlines() if "error: " in text]
        assert len(errors) == 1 and message in errors[0], (name, line)
    assert [result["bad field"][0] for result in two] == [2, 2]
    assert "has-field.jsonl:2" in two[0]["bad field"][1]
    assert [result["odd length"][0] for result in two] == [2, 2]
    assert "--sequence-parallel needs --seq-length divisible by 2, got 33" in two[0]["odd length"][1]
    assert (workspace / "occupied.jsonl").read_text() == "mine"
    assert len(read(workspace / "train.jsonl")) == 43
    assert not [path.name for path in workspace.iterdir() if path.name.startswith(("o.jsonl", "never.jsonl"))]
    assert not (workspace / "nan.jsonl").exists()


# ---- interruption


# The tool, which ends without warning once 16 lines are written.
KILLED = """
import os, runpy, signal, sys
from qtarget_megatron.resumable import ResumableLines

append, written = ResumableLines.append, [0]

def append_and_count(self, lines):
    lines = list(lines)
    append(self, lines)
    written[0] += len(lines)
    if written[0] >= 16:
        os.kill(os.getpid(), signal.SIGKILL)

ResumableLines.append = append_and_count
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_a_killed_run_goes_on_where_it_stopped_at_another_layout(workspace, tmp_path):
    words = ["--hf-model", workspace / "untied", "--data", workspace / "many.jsonl", "--seq-length", S]
    words += ["--reference-hf", workspace / "teacher"]
    out, partial = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial"
    tool = REPOSITORY / "tools" / "score.py"
    command = [sys.executable, *map(str, [tool, *words, "--out", out])]
    killed = [sys.executable, "-c", KILLED, *command[1:]]
    first = subprocess.run(killed, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert first.returncode == -signal.SIGKILL, first.stderr[-3000:]
    done = partial.read_bytes()
    assert 16 <= done.count(b"\n") < 900 and not out.exists()
    partial.write_bytes(done + b'{"messages": [{"role": "us')  # a line that did not reach the disk whole

    module = ["qtarget_megatron.commands.score", *words, "--out"]
    other = run_alone([*module, out, "--temp", 2], timeout=800, folder=tmp_path)
    assert other.returncode == 2
    assert "out.jsonl.partial was begun with a different --temp: go on with the same, or delete it" in other.stdout
    assert partial.read_bytes().startswith(done)

    again = run_torchrun(2, [*module, out, "--micro-batch-size", 4], timeout=240)
    assert again.returncode == 0, again.stdout[-3000:]
    assert f"score: going on behind the {done.count(b'\n')} samples that are scored already" in again.stdout
    assert again.stdout.count("score: wrote 900 samples with old_log_prob and weight") == 1
    assert "samples/s, 0:00:00 left" in again.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl"]
    assert out.read_bytes().startswith(done)

    whole = tmp_path / "whole.jsonl"
    done = run_alone([*module, whole], timeout=800, folder=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    resumed, expected = read(out), read(whole)
    assert len(resumed) == len(expected) == 900
    for a, b in zip(resumed, expected, strict=True):
        assert a.pop("old_log_prob") == pytest.approx(b.pop("old_log_prob"), rel=0, abs=TOLERANCE)
        assert math.isclose(a.pop("weight"), b.pop("weight"), rel_tol=TOLERANCE)
        assert a == b


def test_help_explains_without_a_model():
    command = [sys.executable, str(REPOSITORY / "tools" / "score.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=800)
    assert result.returncode == 0
    for piece in (
        "--reference-hf",
        "--seq-length",
        "torchrun",
        "old_log_prob",
        "exp(temp * mean_t(log p - log p_ref))",
    ):
        assert piece in result.stdout


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_written_lies_between_the_bounds_that_the_disk_is_looked_at_for(tmp_path, monkeypatch, overwrite):
    """Against the lines themselves, with the shortest and the longest numbers there are."""
    numbers = [[0.0] * 50, [-1.23456789e-100] * 50]
    texts = [{"prompt": "a", "completion": "b"}, {"prompt": "\u00e9" * 200, "completion": "x", "note": "\u20ac" * 99}]
    if overwrite:
        texts = [record | {"old_log_prob": "y" * 40, "weight": 1} for record in texts]
    path = tmp_path / "data.jsonl"
    path.write_text("\n\n".join(json.dumps(record, ensure_ascii=False) for record in texts) + "\n")
    file = JsonlFile(path)
    options = scoring.ScoreOptions(
        hf_model=tmp_path, data=path, out=tmp_path / "o", seq_length=64, reference=tmp_path, overwrite=overwrite
    )
    for values in numbers:
        lines = [
            scoring.with_fields(
                file.text(i), file.raw(i), options.fields, {"old_log_prob": values, "weight": values[0]}
            )
            for i in range(len(file))
        ]
        written = sum(len(line.encode()) + 1 for line in lines)

        def look(free, there=0):
            monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
            return scoring.check_room(options, file, 100, there)

        # Room for what is written is never refused; without a warning there is room.
        look(written)
        assert look(written - 1) is not None and look(written - 1 - 10**6, 10**6 + 1) is not None
        assert look(10**6) is None and look(0, 10**6) is None
        with pytest.raises(ValueError, match="of free disk space for what is to be written"):
            look(499)
