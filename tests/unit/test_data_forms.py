"""The forms of a record: each gives what the same conversation gives when it is written out as messages."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from row_data import sizes_of
from small_tokenizers import CHATML, byte_tokenizer, chat

from qtarget_megatron.commands import cache_teacher, inspect_targets, parsers, score
from qtarget_megatron.data import FORMS, JsonlFile, canonical, encode, form_of
from qtarget_megatron.data import open_records as open_data

CALL = {"name": "f", "arguments": {"x": "é", "n": [1, {}]}}
TOOL = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": TOOL}
# One record of each form, of which the first four are the same conversation or question.
RECORDS = {
    "messages": chat("u:Hi", "a:One"),
    "prompt": {"prompt": "Hi", "completion": "One"},
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "One"}]},
    "alpaca": {"instruction": "Hi", "input": "", "output": "One"},
    "tokens": {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
}


def says(*turns):
    """says("human:Hi") -> a record of ShareGPT's form."""
    return {"conversations": [dict(zip(("from", "value"), turn.split(":", 1), strict=True)) for turn in turns]}


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def refusal(record, form="auto"):
    with pytest.raises(ValueError) as caught:
        canonical(record, form)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    return str(caught.value)


# ---- what each form means


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        (RECORDS["messages"], chat("u:Hi", "a:One")),
        (RECORDS["sharegpt"], chat("u:Hi", "a:One")),
        ({"conversations": chat("s:S", "u:Hi", "a:One")["messages"]}, chat("s:S", "u:Hi", "a:One")),
        (says("user:Hi 👧\n", "chatgpt: a", "human:So", "assistant:b", "user:?", "model:c", "user:!", "bot:d"),
         chat("u:Hi 👧\n", "a: a", "u:So", "a:b", "u:?", "a:c", "u:!", "a:d")),
        (says("human:Hi", "tool:1", "observation:2", "function_response:3", "gpt:4"),
         chat("u:Hi", "t:1", "t:2", "t:3", "a:4")),
        # a system text of the record, unless it is none, or the first message's
        (says("human:Hi", "gpt:One") | {"system": "S"}, chat("s:S", "u:Hi", "a:One")),
        (says("human:Hi", "gpt:One") | {"system": ""}, chat("u:Hi", "a:One")),
        (says("human:Hi", "gpt:One") | {"system": None}, chat("u:Hi", "a:One")),
        (says("system:S", "human:Hi", "gpt:One") | {"system": "S"}, chat("s:S", "u:Hi", "a:One")),
        (says("system:S", "system:T", "human:Hi", "gpt:One"), chat("s:S", "s:T", "u:Hi", "a:One")),
        # null fields, as other programs write columns that a row does not have
        ({"conversations": [{"from": "human", "value": "Hi", "role": None, "weight": None},
                            {"role": "assistant", "content": "One", "from": None, "value": None}],
          "prompt": None, "completion": None, "messages": None}, chat("u:Hi", "a:One")),
        # Alpaca
        (RECORDS["alpaca"], chat("u:Hi", "a:One")),
        ({"instruction": "Add", "input": "1\n2", "output": "3"}, chat("u:Add\n\n1\n2", "a:3")),
        ({"instruction": "Add", "output": "3"}, chat("u:Add", "a:3")),
        ({"instruction": "Add", "input": None, "output": "3", "history": None, "system": None}, chat("u:Add", "a:3")),
        ({"instruction": "", "input": "x", "output": "3"}, chat("u:x", "a:3")),
        ({"instruction": "Add", "input": "1", "output": "", "system": "S", "history": [["a", "b"], ["c", ""]]},
         chat("s:S", "u:a", "a:b", "u:c", "a:", "u:Add\n\n1", "a:")),
    ],
)  # fmt: skip
def test_a_conversation_is_the_same_in_every_form(record, messages):
    assert canonical(record)["messages"] == [
        message | {key: None for key in canonical(record)["messages"][i] if key not in message}
        for i, message in enumerate(messages["messages"])
    ]
    tokenizer = byte_tokenizer(CHATML)
    ours, theirs = encode(tokenizer, record, 512), encode(tokenizer, messages, 512)
    assert ours.input_ids.tolist() == theirs.input_ids.tolist()
    assert ours.supervised.tolist() == theirs.supervised.tolist()


@pytest.mark.parametrize(
    ("value", "calls"),
    [
        (json.dumps(CALL), [{"type": "function", "function": CALL}]),
        (json.dumps([CALL, {"name": "g"}]), [{"type": "function", "function": f} for f in (CALL, {"name": "g"})]),
        (CALL, [{"type": "function", "function": CALL}]),
        ({**CALL, "id": "a"}, [{"type": "function", "id": "a", "function": CALL}]),
        ([{"id": "a", "function": CALL}], [{"type": "function", "id": "a", "function": CALL}]),
        ({**CALL, "arguments": json.dumps(CALL["arguments"])},
         [{"type": "function", "function": {"name": "f", "arguments": json.dumps(CALL["arguments"])}}]),
    ],
)  # fmt: skip
def test_a_function_call_becomes_tool_calls(value, calls):
    record = says("human:Hi", "function_call:", "observation:42", "gpt:Done")
    record["conversations"][1] |= {"value": value, "weight": 1}
    assert canonical(record)["messages"][1] == {"role": "assistant", "content": None, "tool_calls": calls, "weight": 1}


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ([TOOL], [WRAPPED]),
        ([WRAPPED], [WRAPPED]),
        (json.dumps([TOOL]), [WRAPPED]),
        ("[]", None),
        ("", None),
        ("null", None),
        ([], None),
        (None, None),
    ],
)
def test_tools_may_be_text_and_are_wrapped_as_templates_expect_them(tools, expected):
    assert canonical(RECORDS["sharegpt"] | {"tools": tools})["tools"] == expected
    # of messages text is read too, and what a tool is made of stays
    ours = canonical(RECORDS["messages"] | {"tools": tools})["tools"]
    assert ours == (expected if tools in ([WRAPPED], None) or not expected else [TOOL])
    assert "tools" not in canonical(RECORDS["sharegpt"])


def test_a_message_keeps_what_it_says_besides():
    record = says("human:Hi", "gpt:One", "human:So?", "gpt:Two")
    record["conversations"][1] |= {"loss": False, "reasoning_content": "hm", "name": "x"}
    turns = canonical(record)["messages"]
    assert turns[1] == {"role": "assistant", "content": "One", "loss": False, "reasoning_content": "hm", "name": "x"}
    tokenizer = byte_tokenizer(CHATML)
    record["conversations"][1].pop("reasoning_content")
    sample = encode(tokenizer, record, 512)
    assert tokenizer.decode(sample.input_ids[sample.supervised]) == "Two<|im_end|>"


def test_text_parts_are_read_in_every_form_that_has_messages():
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    record = says("system:S", "human:", "gpt:One") | {"system": "S"}
    record["conversations"][0]["value"] = [{"type": "text", "text": "S"}]
    record["conversations"][1]["value"] = parts
    plain = encode(byte_tokenizer(CHATML), chat("s:S", "u:Hi you", "a:One"), 512)
    assert encode(byte_tokenizer(CHATML), record, 512).input_ids.tolist() == plain.input_ids.tolist()
    record["conversations"][1]["value"] = [{"type": ["image"], "image": "x"}]
    assert "message 1" in refusal(record) and "got a part of type a list" in refusal(record)


@pytest.mark.parametrize("form", FORMS)
def test_other_fields_are_kept_and_fields_of_other_forms_are_not(form):
    record = RECORDS[form] | {"weight": [1, 2], "id": "é", "text": None}
    read = canonical(record)
    assert {name: read[name] for name in ("weight", "id", "text")} == {"weight": [1, 2], "id": "é", "text": None}
    # what came out is of a form itself, and stays as it is
    assert canonical(read) == read
    everything = {name: value for one in RECORDS.values() for name, value in one.items()} | record
    assert canonical(everything, form) == read | ({} if form == "alpaca" else {"input": ""})


# ---- token ids


def test_token_ids_are_read_as_they_are():
    tokenizer = byte_tokenizer()  # without a chat template
    ids = tokenizer("What is the capital of France?").input_ids
    labels = [token if i % 3 else -100 for i, token in enumerate(ids)]
    for labels[0] in (-100, ids[0]):
        for extra in ({}, {"attention_mask": [1] * len(ids)}, {"attention_mask": None, "token_type_ids": [0]}):
            sample = encode(tokenizer, {"input_ids": ids, "labels": labels} | extra, 512)
            assert sample.input_ids.tolist() == ids and not sample.truncated
            assert sample.supervised.tolist() == [bool(i % 3) for i in range(len(ids))]
            assert (sample.answers, sample.unended, sample.dated, sample.weighted) == (0, 0, False, False)


def test_token_ids_are_cut_with_their_side_inputs():
    record = {"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9], "weight": [0.5, 1.5, 2.5]}
    for seq_length, count in ((9, 3), (4, 3), (3, 2), (2, 1), (1, 1)):
        sample = encode(byte_tokenizer(), record, seq_length, ("weight",))
        assert sample.input_ids.tolist() == record["input_ids"][: seq_length + 1]
        assert sample.truncated == (seq_length < 4)
        assert sample.inputs["weight"][sample.supervised].tolist() == record["weight"][:count]
    untrained = {"input_ids": [5, 6], "labels": [5, -100]}  # nothing comes before the first token
    assert not encode(byte_tokenizer(), untrained, 9).supervised.any()


def test_a_conversation_that_is_tokenised_trains_the_same_tokens(tmp_path):
    tokenizer = byte_tokenizer(CHATML)
    sample = encode(tokenizer, chat("s:S", "u:Hi 👧", "a:One", "u:So", "a:Two"), 512)
    labels = np.where(sample.supervised, sample.input_ids, -100).tolist()
    file = open_data(write_lines(tmp_path / "d.jsonl", [{"input_ids": sample.input_ids.tolist(), "labels": labels}]))
    again = encode(tokenizer, file.record(0), 512)
    assert np.array_equal(again.input_ids, sample.input_ids) and np.array_equal(again.supervised, sample.supervised)
    assert sizes_of(file, tokenizer, 512).supervised == [sample.supervised.sum()]


@pytest.mark.parametrize("token", [-1, 99_999, 10**30, -100])
def test_ids_that_the_tokenizer_does_not_have_are_refused(token):
    with pytest.raises(ValueError, match=rf'"input_ids": .*got {str(token)[:20]}.* at entry 1, .*no token'):
        encode(byte_tokenizer(), {"input_ids": [5, token], "labels": [-100, token]}, 9)


# ---- which form it is


@pytest.mark.parametrize("form", FORMS)
def test_the_first_record_tells_the_form(tmp_path, form):
    path = write_lines(tmp_path / "d.jsonl", [RECORDS[form]] * 2)
    assert form_of(RECORDS[form]) == form
    for asked in ("auto", form):
        file = open_data(path, asked)
        assert isinstance(file, JsonlFile) and file.form == form
        assert file.record(1) == canonical(RECORDS[form]) and file.raw(1) == RECORDS[form]
    assert open_data(path).digest == open_data(path, form).digest
    for other in FORMS:
        if other != form:
            with pytest.raises(ValueError, match=rf"d\.jsonl:1: .*the form {other}, .* got the form {form}: split"):
                open_data(path, other)


@pytest.mark.parametrize("form", FORMS)
def test_a_record_of_another_form_is_named_with_what_to_do(tmp_path, form):
    other = next(name for name in FORMS if name != form)
    path = write_lines(tmp_path / "d.jsonl", [RECORDS[form], RECORDS[other], RECORDS[form], {"text": "x"}, {}])
    file = open_data(path)
    assert file.record(2) == canonical(RECORDS[form])
    with pytest.raises(ValueError) as caught:
        file.record(1)
    line = str(caught.value)
    assert line.startswith(f"{path}:2: record: expected the form {form}, as the first record or --data-format has it")
    assert f"got the form {other}: split the file" in line and "or convert it" in line and "\n" not in line
    with pytest.raises(ValueError, match=rf'd\.jsonl:4: record of the form {form}: expected ".*, got "text"'):
        file.record(3)
    with pytest.raises(ValueError, match=r"d\.jsonl:5: .*, got no fields"):
        file.record(4)


@pytest.mark.skipif(shutil.which("jq") is None, reason="the recipe is jq's")
@pytest.mark.parametrize("form", FORMS)
def test_the_recipe_that_is_given_splits_the_file(tmp_path, monkeypatch, form):
    other = next(name for name in FORMS if name != form)
    path = write_lines(tmp_path / "d.jsonl", [RECORDS[form], RECORDS[other], RECORDS[form] | {"id": 2}])
    with pytest.raises(ValueError) as caught:
        open_data(path).record(1)
    recipe = str(caught.value).partition("(jq")[2].partition("),")[0]
    monkeypatch.chdir(tmp_path)
    subprocess.run(f"jq{recipe}", shell=True, check=True)
    written = [json.loads(line) for line in (tmp_path / f"{form}.jsonl").read_text().splitlines()]
    assert written == [RECORDS[form], RECORDS[form] | {"id": 2}]


def test_a_record_of_several_forms_asks_which_is_meant(tmp_path):
    both = chat("u:Hi", "a:One") | RECORDS["alpaca"] | {"prompt": "x"}
    assert "those of messages and alpaca: say which is meant, with --data-format messages" in refusal(both)
    path = write_lines(tmp_path / "d.jsonl", [both])
    with pytest.raises(ValueError, match=r"d\.jsonl:1: .*say which"):
        open_data(path)
    for form in ("messages", "alpaca"):
        (record,) = (file.record(0) for file in [open_data(path, form)])
        assert encode(byte_tokenizer(CHATML), record, 512).supervised.any()
    # fields that make no form of their own do not matter
    assert form_of(chat("u:Hi", "a:One") | {"prompt": "Hi", "completion": None}) == "messages"


def test_a_file_without_records_has_no_form(tmp_path):
    assert open_data(write_lines(tmp_path / "d.jsonl", [])).form == "auto"
    with pytest.raises(ValueError, match="expected auto, messages, .*, got 'llama'"):
        open_data(write_lines(tmp_path / "e.jsonl", [RECORDS["prompt"]]), "llama")


RUN = ["--data", "d", "--out", "o", "--seq-length", "8"]


@pytest.mark.parametrize("form", ["auto", *FORMS])
def test_the_flag_reaches_the_commands(form):
    for command, words in ((score, ["--hf-model", "m"]), (cache_teacher, ["--teacher-hf", "m", "--k", "1"])):
        ours = command.command_line().parse_args([*words, *RUN, *(["--data-format", form] if form != "auto" else [])])
        assert parsers.run_options(ours, "m")["data_format"] == form
    words = ["--hf-model", "m", "--data", "d", "--out", "o", "--data-format", form]
    assert inspect_targets.command_line().parse_args(words).data_format == form


def test_the_flag_refuses_another_word_and_its_help_shows_every_form(capsys):
    with pytest.raises((SystemExit, ValueError)):
        score.command_line().parse_args(["--hf-model", "m", *RUN, "--data-format", "chatml"])
    text = " ".join(score.command_line().format_help().split())
    assert all(f'"{field}"' in text for fields in FORMS.values() for field in fields)
    assert "labels[i] is input_ids[i]" in text


# ---- what is wrong with a record


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "record: expected an object, got a list"),
        ({}, 'expected "messages", or "prompt" and "completion", or "conversations", or .*got no fields'),
        ({"instruction": "a"}, '"instruction" and "output", or "input_ids" and "labels", got "instruction"'),
        ({"instruction": "a", "output": None}, 'got "instruction"'),
        ({"instruction": "a", "output": ["b"]}, '"output": expected a string, got a list'),
        ({"instruction": 1, "output": "b"}, '"instruction": expected a string, got 1'),
        ({"instruction": "a", "output": "b", "input": 0}, '"input": expected a string, got 0'),
        ({"instruction": "a", "output": "b", "system": []}, '"system": expected a string, got a list'),
        ({"instruction": "a", "output": "b", "history": {}}, '"history": expected a list, got an object'),
        ({"instruction": "a", "output": "b", "history": [["x", "y"], ["x"]]}, "pairs .*, got a list at entry 1"),
        ({"instruction": "a", "output": "b", "history": [["x", None]]}, "pairs .* of strings, got a list at entry 0"),
        ({"conversations": []}, '"conversations": expected at least one message, got none'),
        ({"conversations": "Hi"}, '"conversations": expected a list, got a string'),
        ({"conversations": [None]}, "message 0: expected an object, got null"),
        (says("human:Hi", "robot:One"), 'message 1, "from": expected one of system, .*human, gpt.*; got "robot"'),
        ({"conversations": [{"value": "Hi"}]}, 'message 0, "from": expected one of .*; got null'),
        ({"conversations": [{"from": ["x"], "value": "Hi"}]}, '"from": expected one of .*; got a list'),
        ({"conversations": [{"from": "human", "role": "user", "value": "Hi"}]}, 'one of "from" and "role", got both'),
        ({"conversations": [{"from": "human", "value": "a", "content": "b"}]}, '"value" and "content", got both'),
        ({"conversations": [{"from": "human"}]}, 'message 0: expected "from" and "value", got no "value"'),
        ({"conversations": [{"from": "human", "value": None}]}, 'got no "value"'),
        ({"conversations": [{"from": "human", "value": 3}]}, 'message 0, "content": expected a string, got 3'),
        (says("human:Hi", "gpt:a") | {"system": 3}, '"system": expected a string, got 3'),
        (says("system:S", "human:Hi", "gpt:a") | {"system": "T"}, "expected one system text, got .*keep one"),
        (says("human:Hi", "gpt:a") | {"tools": "{"}, '"tools": expected a list, or JSON text of one, got "{"'),
        (says("human:Hi", "gpt:a") | {"tools": '{"a": 1}'}, '"tools": expected a list, got an object'),
        (says("human:Hi", "gpt:a") | {"tools": '["f"]'}, "tool 0: expected an object, got a string"),
        (says("human:Hi", "function_call:f(1)"), r"message 1: .*JSON of a call.*, got \"f\(1\)\""),
        (says("human:Hi", "function_call:[]"), "message 1: expected at least one call"),
        (says("human:Hi", "function_call:3"), "message 1, function_call: expected an object, got 3"),
        (says("human:Hi", "function_call:{}"), 'message 1, tool call 0, "name": expected a string, got null'),
        (says("human:Hi", 'function_call:{"name": "f", "arguments": [1]}'), '"arguments": expected an object'),
        ({"conversations": [{"from": "human", "value": "Hi", "weight": 1}]}, "only assistant messages are trained on"),
        ({"input_ids": [1, 2]}, 'got "input_ids"'),
        ({"input_ids": [], "labels": []}, '"input_ids": expected at least one token, got none'),
        ({"input_ids": "12", "labels": [1, 2]}, '"input_ids": expected a list, got a string'),
        ({"input_ids": [1, 2.0], "labels": [1, 2]}, '"input_ids": expected integers, got 2.0 at entry 1'),
        ({"input_ids": [1, True], "labels": [1, 1]}, '"input_ids": expected integers, got true at entry 1'),
        ({"input_ids": [[1, 2]], "labels": [[1, 2]]}, '"input_ids": expected integers, got a list at entry 0'),
        ({"input_ids": [1, 2], "labels": [1, None]}, '"labels": expected integers, got null at entry 1'),
        ({"input_ids": [1, 2], "labels": [2]}, '"labels": expected as many as "input_ids", 2, got 1'),
        ({"input_ids": [1, 2, 3], "labels": [-100, 2, 4]}, "expected 3 or -100 at entry 2, got 4: .*aligned with"),
        ({"input_ids": [1, 2, 3], "labels": [2, 3, -100]}, "entry 0, got 2: .*shifted by one.* aligned, not shifted"),
        ({"input_ids": [1, 2, 3], "labels": [-100, 3, 9]}, "shifted by one"),
        ({"input_ids": [1, 2, 0], "labels": [1, 2, 0], "attention_mask": [1, 1, 0]}, "a 1 for each of the 3 .*padding"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": [1]}, "a 1 for each of the 2"),
        ({"input_ids": [1, 2], "labels": [1, 2], "attention_mask": "11"}, "a 1 for each of the 2"),
    ],
)  # fmt: skip
def test_what_a_form_does_not_allow_is_refused(tmp_path, record, message):
    line = refusal(record)
    with pytest.raises(ValueError, match=message):
        raise ValueError(line)
    if isinstance(record, dict):
        with pytest.raises(ValueError) as caught:
            open_data(write_lines(tmp_path / "d.jsonl", [record]))
        assert str(caught.value) == f"{tmp_path}/d.jsonl:1: {line}"


def test_conversations_that_begin_with_an_answer_say_what_to_do():
    tokenizer = byte_tokenizer(CHATML)
    record = says("gpt:Hello", "human:Hi", "gpt:One")
    with pytest.raises(ValueError, match='message 0: .* got an assistant\'s: drop it, or give it "weight": 0'):
        encode(tokenizer, record, 512)
    record["conversations"][0]["weight"] = 0
    sample = encode(tokenizer, record, 512)
    assert tokenizer.decode(sample.input_ids[sample.supervised]) == "One<|im_end|>"
    assert tokenizer.decode(sample.input_ids).startswith("<|im_start|>assistant\nHello<|im_end|>")
