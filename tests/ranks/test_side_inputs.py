"""Side inputs of an objective: from fields of a record to the label they belong to, and the importance weight."""

import contextlib
import io
import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from launching import run_ranks
from row_data import padded_rows, sizes_of
from small_tokenizers import CHATML, byte_tokenizer, chat
from torch.utils.data import DataLoader, default_collate

from qtarget_megatron import objectives
from qtarget_megatron.data import Batch, JsonlFile, encode
from qtarget_megatron.data.side_inputs import batch_key, importance_weight
from qtarget_megatron.teacher_cache import CacheHeader, CacheWriter, SampleEntries, TeacherCache, context_digests

# Prompt of 3 tokens; supervised: x, y and the end-of-sequence token.
COMPLETION = {"prompt": "abc", "completion": "xy"}


def completions():
    return byte_tokenizer(size=256, special=["</s>"])


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return JsonlFile(path)


def dataset(file, tokenizer, seq_length, names=(), **keywords):
    return padded_rows(file, tokenizer, seq_length, num_rows=len(file), shuffle=False, names=names, **keywords)


# ---- alignment


@pytest.mark.parametrize(
    ("seq_length", "labels", "is_prompt"),
    [(8, "bcxy$", [1, 1, 0, 0, 0, 0, 0, 0]), (3, "bcx", [1, 1, 0])],
)
def test_with_the_prompts_all_tokens_are_targets(tmp_path, seq_length, labels, is_prompt):
    file = write_lines(tmp_path / "d.jsonl", [COMPLETION])
    item = dataset(file, completions(), seq_length, ("is_prompt",))[0]
    assert int((item["labels"] != -100).sum()) == len(labels)
    assert item[batch_key("is_prompt")].tolist() == is_prompt
    assert torch.equal(item["labels"][: len(labels) - 1], item["tokens"][1 : len(labels)])


def test_with_the_prompts_a_conversation_ends_with_its_last_answer():
    tokenizer = byte_tokenizer(CHATML, eos="<|im_end|>")
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
        {"role": "user", "content": "e"},
    ]
    plain = encode(tokenizer, {"messages": messages}, 200)
    both = encode(tokenizer, {"messages": messages}, 200, ("is_prompt",))
    last = np.flatnonzero(plain.supervised)[-1]
    assert both.supervised[1 : last + 1].all() and not both.supervised[last + 1 :].any() and not both.supervised[0]
    assert np.array_equal(both.inputs["is_prompt"] == 1, both.supervised & ~plain.supervised)


@pytest.mark.parametrize(
    ("seq_length", "expected"),
    [
        (8, [0, 0, 0.5, 1.5, 2.5, 0, 0, 0]),  # labels b c x y $
        (5, [0, 0, 0.5, 1.5, 2.5]),
        (4, [0, 0, 0.5, 1.5]),
        (3, [0, 0, 0.5]),
    ],
)
def test_values_stand_where_their_tokens_are_labels(tmp_path, seq_length, expected):
    file = write_lines(tmp_path / "d.jsonl", [COMPLETION | {"weight": [0.5, 1.5, 2.5], "critical": True, "note": "x"}])
    item = dataset(file, completions(), seq_length, ("weight", "critical"))[0]
    assert item[batch_key("weight")].tolist() == expected
    assert item[batch_key("critical")].tolist() == [float(value > 0) for value in expected]
    assert {item[batch_key(name)].dtype for name in ("weight", "critical")} == {torch.float64}
    assert torch.equal(item["labels"] != -100, item[batch_key("weight")] != 0)
    assert set(item) == {
        "tokens",
        "labels",
        "position_ids",
        "padding",
        "sample",
        *map(batch_key, ("weight", "critical")),
    }


def test_values_run_on_over_the_answers_of_a_conversation():
    tokenizer = byte_tokenizer(CHATML)
    record = chat("u:Hi", "a:One", "u:And?", "a:Two")
    sample = encode(tokenizer, record, 512)
    count = int(sample.supervised.sum())
    values = [0.25 * i + 1 for i in range(count)]
    filled = encode(tokenizer, record | {"old_log_prob": values}, 512, ["old_log_prob"])
    assert filled.inputs["old_log_prob"].dtype == np.float64
    assert filled.inputs["old_log_prob"][sample.supervised].tolist() == values
    assert not filled.inputs["old_log_prob"][~sample.supervised].any()
    runs = np.flatnonzero(np.diff(sample.supervised.astype(int)) == 1)
    assert len(runs) == 2, "two answers, with tokens between them that get no value"
    # Cut inside the second answer: the list's rest goes with the tokens.
    kept = int(runs[1]) + 2
    cut = encode(tokenizer, record | {"old_log_prob": values}, kept, ["old_log_prob"])
    assert cut.truncated and 0 < cut.supervised.sum() < count
    assert cut.inputs["old_log_prob"].tolist() == filled.inputs["old_log_prob"][: kept + 1].tolist()
    assert sample.inputs == {}


def test_one_number_goes_to_every_supervised_token():
    for value, expected in ((2, 2.0), (0.1, 0.1), (True, 1.0), (False, 0.0), (-3.5, -3.5)):
        sample = encode(completions(), COMPLETION | {"weight": value}, 8, ("weight",))
        assert sample.inputs["weight"].tolist() == [0, 0, 0, expected, expected, expected]
    mixed = encode(completions(), COMPLETION | {"critical": [True, 0, 0.5]}, 8, ("critical",))
    assert mixed.inputs["critical"].tolist() == [0, 0, 0, 1, 0, 0.5]


def test_float64_values_survive_unrounded():
    value = 0.1234567890123456789
    assert encode(completions(), COMPLETION | {"weight": value}, 8, ("weight",)).inputs["weight"][-1] == value


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_batches_stack_side_inputs_like_labels(tmp_path):
    records = [{"prompt": "p", "completion": "q" * n, "weight": n, "old_log_prob": [-n] * (n + 1)} for n in range(1, 5)]
    data = dataset(write_lines(tmp_path / "d.jsonl", records), completions(), 6, ("weight", "old_log_prob"))
    batch = default_collate([data[i] for i in range(4)])
    assert batch[batch_key("weight")].shape == batch["labels"].shape == (4, 6)
    assert batch[batch_key("weight")].dtype == torch.float64
    assert torch.equal(batch[batch_key("weight")], -batch[batch_key("old_log_prob")])
    assert [row[row != 0].unique().tolist() for row in batch[batch_key("weight")]] == [[1], [2], [3], [4]]
    assert torch.equal(batch[batch_key("weight")] != 0, batch["labels"] != -100)
    (loaded,) = DataLoader(data, batch_size=4, num_workers=1)
    assert all(torch.equal(loaded[name], batch[name]) for name in batch)


def test_records_without_supervised_tokens_need_no_field(tmp_path):
    empty = {"prompt": "abc", "completion": " "}
    file = write_lines(tmp_path / "d.jsonl", [empty, COMPLETION | {"weight": 1}, empty | {"weight": "ignored"}])
    assert sizes_of(file, completions(), 8, ("weight",)).supervised.tolist() == [0, 3, 0]
    assert encode(completions(), empty, 8, ("weight",)).inputs["weight"].tolist() == [0] * 5
    # Cut before the first target, likewise.
    assert sizes_of(write_lines(tmp_path / "e.jsonl", [COMPLETION]), completions(), 2, ("weight",)).supervised == [0]


# ---- errors

COUNTED = '"weight": expected a number or 3 numbers (one per supervised token), got '
FINITE = '"weight": expected a finite number or a list of them, got '


@pytest.mark.parametrize(
    ("field", "seq_length", "message"),
    [
        ("[1, 2]", 8, COUNTED + "2"),
        ("[1, 2, 3, 4]", 8, COUNTED + "4"),
        ("[]", 8, COUNTED + "0"),
        ("[1]", 4, '"weight": expected a number or at least 2 numbers (one per supervised token), got 1'),
        ("[]", 3, '"weight": expected a number or at least 1 number (one per supervised token), got 0'),
        ("NaN", 8, FINITE + "NaN"),
        ("-Infinity", 8, FINITE + "-Infinity"),
        ("1e999", 8, FINITE + "Infinity"),
        ("1" + "0" * 400, 8, FINITE + "1" + "0" * 26 + "..."),
        ('"1"', 8, FINITE + "a string"),
        ("null", 8, FINITE + "null"),
        ("{}", 8, FINITE + "an object"),
        ("[1, NaN, 3]", 8, FINITE + 'NaN at entry 1 of "weight"'),
        ("[1, 2, null]", 8, FINITE + 'null at entry 2 of "weight"'),
        ('[1, "2", 3]', 8, FINITE + 'a string at entry 1 of "weight"'),
        ("[[1, 2, 3], 1, 2]", 8, FINITE + 'a list at entry 0 of "weight"'),
        ("[1, 2, Infinity]", 4, FINITE + 'Infinity at entry 2 of "weight"'),  # also in the part that is cut off
    ],
)
def test_a_bad_field_is_named_with_its_line(tmp_path, field, seq_length, message):
    good = json.dumps(COMPLETION | {"weight": 1}) + "\n"
    (tmp_path / "d.jsonl").write_text(good + "\n" + json.dumps(COMPLETION)[:-1] + f', "weight": {field}}}\n')
    file = JsonlFile(tmp_path / "d.jsonl")
    with pytest.raises(ValueError) as caught:
        sizes_of(file, completions(), seq_length, ("weight",))
    assert str(caught.value) == f"{tmp_path}/d.jsonl:3: {message}"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("old_log_prob", "qtarget score computes it"),
        ("weight", "qtarget score --reference-hf compute importance weights"),
        ("mine", "add a number, or a list with one number per supervised token"),
    ],
)
def test_a_missing_field_says_where_it_comes_from(tmp_path, name, hint):
    file = write_lines(tmp_path / "d.jsonl", [COMPLETION | {name: 1}, COMPLETION])
    with pytest.raises(ValueError, match=rf'd\.jsonl:2: the objective needs "{name}", this record has none: .*{hint}'):
        sizes_of(file, completions(), 8, (name,))
    assert len(sizes_of(file, completions(), 8)) == 2


@pytest.mark.parametrize("name", ["messages", "tools", "prompt", "completion", "input_ids", "labels", "output"])
def test_a_side_input_cannot_replace_a_part_of_the_record(name):
    with pytest.raises(ValueError, match=f"cannot be named {name}: rename it"):
        encode(completions(), COMPLETION, 8, ("weight", name))


def with_cached_teacher(file, cache, names=()):
    """The parts of the first sample."""
    from qtarget_megatron.megatron.training.datasets import TaughtSamples

    parts = dataset(file, completions(), 8, names, taught=lambda samples: TaughtSamples(samples, TeacherCache(cache)))[
        0
    ]
    return {name: np.asarray(value) for name, value in parts.items()}


@pytest.mark.distributed
def test_a_side_input_may_be_named_as_a_part_of_the_batch_is(tmp_path):
    """Of every part that there is, a cached teacher's too: each keeps its own values."""
    tokenizer, k = completions(), 2
    file = write_lines(tmp_path / "d.jsonl", [COMPLETION])
    sample = encode(tokenizer, COMPLETION, 8)
    supervised = int(sample.supervised.sum())
    kept = SampleEntries(
        ids=np.tile([1, 2], (supervised, 1)),
        log_p=np.full((supervised, k), math.log(0.25), dtype=np.float32),
        counts=np.full(supervised, k),
        tail=np.full(supervised, 0.5, dtype=np.float32),
        context=context_digests(sample.input_ids, sample.supervised),
    )
    header = CacheHeader(
        **dict.fromkeys(("data", "tokenizer", "chat_template", "teacher", "teacher_files", "precision"), "x"),
        **dict(num_samples=1, vocab_size=50, seq_length=8, k=k),
    )
    writer = CacheWriter(tmp_path / "cache", header, tokenizer)
    writer.open()
    writer.append([kept])
    writer.finish()

    (own,) = run_ranks(1, with_cached_teacher, (file, tmp_path / "cache"), megatron=True)
    names = sorted(own.keys() - {"labels"})  # which is a field of records of tokens
    assert {"tokens", "position_ids", "sample", "teacher_ids", "teacher_tail", "teacher_ms"} <= set(names)
    record = COMPLETION | {name: 100.0 + number for number, name in enumerate(names)}
    file = write_lines(tmp_path / "named.jsonl", [record])
    (mixed,) = run_ranks(1, with_cached_teacher, (file, tmp_path / "cache", tuple(names)), megatron=True)
    for number, name in enumerate(names):
        values = mixed[batch_key(name)][own["labels"] != -100]
        assert (values == 100.0 + number).all() and len(values) == supervised, name
    for name in own.keys() - {"teacher_ms"}:
        assert np.array_equal(mixed[name], own[name]), name
    batch = Batch.of({key: torch.from_numpy(np.asarray(value)) for key, value in mixed.items()})
    for name in names:
        assert np.array_equal(batch.inputs[name], mixed[batch_key(name)]), name
    found = {name: getattr(batch, name) for name in ("tokens", "labels", "position_ids", "padding", "sample")}
    found |= {f"teacher_{name}": getattr(batch.teacher, name) for name in ("ids", "log_p", "tail")}
    assert found.keys() == own.keys() - {"teacher_ms"}
    for name, value in found.items():
        assert np.array_equal(value, own[name]), name


# ---- importance weight


@pytest.mark.parametrize(
    ("log_p", "reference", "options", "expected"),
    [
        ([-1.0], [-1.0], {}, 1.0),
        ([-1.0, -2.0], [-2.0, -4.0], {}, math.e**1.5),  # differences 1 and 2, mean 1.5
        ([-1.0, -2.0], [-2.0, -4.0], {"temperature": 2.0, "maximum": 21.0}, math.e**3),
        ([-1.0, -2.0], [-2.0, -4.0], {"temperature": 0.0}, 1.0),
        ([-3.0, -2.0, -1.0], [-1.0, -1.0, -1.0], {}, 1 / math.e),
        ([-1.0, -2.0], [-2.0, -4.0], {"temperature": 2.0, "maximum": 3.5}, 3.5),
        ([-1.0], [-5.0], {}, 16.0),  # e^4 = 54.6
        ([-1.0], [-3.0], {}, math.e**2),
        ([0.0], [-1e6], {}, 16.0),  # exp would overflow
        ([-1e6], [0.0], {}, 0.0),
    ],
)
def test_importance_weight_is_the_formula_by_hand(log_p, reference, options, expected):
    assert importance_weight(log_p, reference, **options) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], []), {}, "got 0 and 0"),
        (([-1.0], [-1.0, -2.0]), {}, "got 1 and 2"),
        (([math.nan], [-1.0]), {}, "finite"),
        (([-math.inf], [-math.inf]), {}, "finite"),
        (([-1.0], [-1.0]), {"temperature": math.nan}, "temperature: expected a finite number"),
        (([-1.0], [-1.0]), {"maximum": 0.0}, "above 0, got 0.0"),
        (([-1.0], [-1.0]), {"maximum": math.inf}, "above 0, got inf"),
    ],
)
def test_importance_weight_refuses_what_has_no_mean(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        importance_weight(*arguments, **options)


# ---- context parallelism


def slices(path):
    """This rank's part of the first batch of two items."""
    from qtarget_megatron.megatron.runtime import cpu_platform

    cpu_platform.activate()
    from megatron.core import parallel_state

    from qtarget_megatron.megatron.training.batches import on_this_rank

    parallel_state.initialize_model_parallel(context_parallel_size=2)
    data = dataset(JsonlFile(path), byte_tokenizer(CHATML), 32, ("weight", "mine"))
    found = on_this_rank(Batch.of(default_collate([data[0], data[1]]))).batch
    own = {name: getattr(found, name) for name in ("tokens", "labels", "position_ids", "padding")}
    return {name: tensor.numpy() for name, tensor in {**own, **found.inputs}.items()}


@pytest.mark.distributed
@pytest.mark.slow
def test_context_parallel_ranks_cut_side_inputs_where_they_cut_labels(tmp_path):
    tokenizer, records = byte_tokenizer(CHATML), []
    for answer in ("a:One", "a:Four Two"):
        record = chat("u:Hi", answer)
        count = int(encode(tokenizer, record, 32).supervised.sum())
        records.append(record | {"weight": [round(0.1 + i, 1) for i in range(count)], "mine": len(records) + 1})
    path = tmp_path / "d.jsonl"
    data = dataset(write_lines(path, records), tokenizer, 32, ("weight", "mine"))
    whole = {name: value.numpy() for name, value in default_collate([data[0], data[1]]).items()}
    parts = run_ranks(2, slices, (str(path),), timeout=120)
    assert sorted(np.concatenate([part["position_ids"][0] for part in parts])) == list(range(32))
    whole |= {name: whole[batch_key(name)] for name in ("weight", "mine")}
    for name in ("tokens", "labels", "padding", "weight", "mine"):
        assert [part[name].shape for part in parts] == [(2, 16), (2, 16)]
        for part in parts:
            assert part[name].dtype == whole[name].dtype
            assert (part[name] == whole[name][:, part["position_ids"][0]]).all(), name
        assert (whole[name] != 0).any()


# ---- values that leave nothing of the objective


def inspected(paths):
    """What rank 0 prints when two ranks inspect each file for its objective, two seconds for each record."""
    from qtarget_megatron.megatron.runtime import logs, progress
    from qtarget_megatron.megatron.training.datasets import DatasetProvider

    progress.time = SimpleNamespace(monotonic=itertools.count(step=2).__next__)
    printed = {}
    for path, name in paths:
        provider = DatasetProvider(
            SimpleNamespace(
                seq_length=16,
                sample_length=None,
                skip_teacher_cache_check=False,
                long_samples="cut",
                data_format="auto",
            ),
            completions(),
            objectives.get(name, **({"refresh": 0} if name == "psft" else {})),
        )
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text), logs.shown():
            provider._inspected(Path(path))
        printed[path] = text.getvalue()
    return printed


@pytest.mark.distributed
def test_what_leaves_nothing_to_train_but_sft_or_little_is_warned_of_at_the_start(tmp_path):
    three = [1, 1, 1]
    expected = {
        "ones": (
            "weighted-sft",
            [{"weight": 1}, {"weight": three}, {"weight": 1.0}],
            '"weight" is 1 .*trains as sft does',
        ),
        "halves": ("weighted-sft", [{"weight": 0.5}] * 3, '"weight" is 0.5 .*this is 0.5 times sft'),
        "masked": ("cft", [{"critical": False}] * 3, '"critical" is 0 .*nothing is trained'),
        # The odd one is in the share of either rank.
        "first": ("weighted-sft", [{"weight": 2}, {"weight": 1}, {"weight": 1}], None),
        "second": ("weighted-sft", [{"weight": 1}, {"weight": [1, 1, 1.001]}, {"weight": 1}], None),
        "psft": ("psft", [{"old_log_prob": -1}] * 3, None),
        "dft": ("dft", [{}] * 3, None),
        "one is skipped": ("dft", [{}, {"completion": " "}, {}], None),
        "most are skipped": ("dft", [{"completion": " "}, {}, {"completion": ""}], "67% .* trained on, 2 of 3: .* 17;"),
    }
    paths = []
    for name, (objective, fields, _) in expected.items():
        write_lines(tmp_path / f"{name}.jsonl", [COMPLETION | field for field in fields])
        paths.append((str(tmp_path / f"{name}.jsonl"), objective))
    first, second = run_ranks(2, inspected, (paths,), timeout=120)
    assert set(second.values()) == {""}
    for name, (_, _, warning) in expected.items():
        text = first[str(tmp_path / f"{name}.jsonl")]
        # From the third second on; of what all ranks have read.
        line = f"qtarget_megatron: reading {tmp_path / name}.jsonl: 3/3 samples, 0.75 samples/s, 0:00:00 left\n"
        assert text.startswith(line) and text.count(": reading ") == 1, text
        assert "3 samples" in text and ("WARNING" in text) == (warning is not None), text
        assert warning is None or re.search(warning, text), text


def test_a_model_scored_against_itself_is_known_before_it_is_scored(tmp_path):
    from qtarget_megatron.megatron.jobs.score import ScoreOptions

    for name, content in (("model", b"one"), ("other", b"two"), ("more", b"one")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(content)
    (tmp_path / "more" / "second.safetensors").write_bytes(b"")
    (tmp_path / "link").symlink_to("model")
    (tmp_path / "linked-file").mkdir()
    (tmp_path / "linked-file" / "model.safetensors").symlink_to("../model/model.safetensors")

    def is_itself(reference, load=None):
        options = dict(hf_model=tmp_path / "model", data=tmp_path / "d.jsonl", out=tmp_path / "o.jsonl", seq_length=8)
        return ScoreOptions(**options, load=load, reference=reference).compares_with_itself

    for same in ("model", "link", "linked-file"):
        assert is_itself(tmp_path / same)
        assert not is_itself(tmp_path / same, load=tmp_path / "checkpoint"), "its weights are others"
    for other in ("other", "more"):
        assert not is_itself(tmp_path / other)
    assert not is_itself(None)


def test_a_frozen_old_policy_says_so_when_training_starts():
    note = objectives.get("psft", refresh=0).note
    assert re.search("beyond 1.28 times .* renews them", note) and "\n" not in note
    help_text = objectives.describe()
    begin = help_text.index("\npsft ")
    assert "The released method takes p_old anew" in " ".join(help_text[begin : begin + 1500].split())


def test_of_the_others_one_departs_from_its_paper_and_says_so():
    assert {n for n in objectives.names() if objectives.example(n).note} == {"anchored"}
    assert "the paper holds it" in objectives.example("anchored").note
