"""Weights of single answers: which tokens get which number, and who does not read them."""

import json

import pytest
from row_data import padded_rows
from small_tokenizers import CHATML, GENERATION, THINKING, byte_tokenizer, chat

from qtarget_megatron.data import JsonlFile, encode
from qtarget_megatron.data.side_inputs import batch_key

CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
# One block for each answer but the empty ones: their number is not that of the assistant messages.
UNKNOWN = GENERATION.replace("{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and m.content %}")


def weighed(*weights, **fields):
    """A conversation of answers A0, A1, ... of these weights; None: an answer that says nothing."""
    record = chat(*[turn for i in range(len(weights)) for turn in (f"u:Q{i}", f"a:A{i}")])
    for message, weight in zip(record["messages"][1::2], weights, strict=True):
        if weight is not None:
            message["weight"] = weight
    return record | fields


def values(record, form=CHATML, seq_length=512, **options):
    """[text of a supervised run of one weight, its weight]"""
    tokenizer = byte_tokenizer(form, size=256)
    sample = encode(tokenizer, record, seq_length, ("weight",), **options)
    assert not sample.weighted and not sample.inputs["weight"][~sample.supervised].any()
    found = []
    for token, weight in zip(
        sample.input_ids[sample.supervised], sample.inputs["weight"][sample.supervised], strict=True
    ):
        text = tokenizer.decode([token])
        if found and found[-1][1] == weight and not found[-1][0].endswith("<|im_end|>"):
            found[-1][0] += text
        else:
            found.append([text, weight])
    return found


@pytest.mark.parametrize("form", [CHATML, GENERATION, THINKING.replace("(loop.last or thought)", "thought")])
@pytest.mark.parametrize(
    ("weights", "fields", "expected"),
    [
        ((0.25, 3), {}, [0.25, 3]),
        ((None, 0.5), {}, [1, 0.5]),
        ((True, 1e-9), {}, [1, 1e-9]),
        ((1, None), {}, [1, 1]),
        ((0.25, 3), {"weight": 2}, [0.5, 6]),
        ((0.25, 3), {"weight": None}, [0.25, 3]),
        ((None, None), {"weight": 2}, [2, 2]),
        ((1, 1), {"weight": 0}, [0, 0]),
    ],
)
def test_an_answer_s_weight_multiplies_the_record_s(form, weights, fields, expected):
    found = values(weighed(*weights, **fields), form)
    assert found == [[f"A{i}<|im_end|>", weight] for i, weight in enumerate(expected)]


@pytest.mark.parametrize("form", [CHATML, GENERATION])
def test_an_answer_of_weight_0_is_no_target(form):
    assert values(weighed(0, 0.5, 0.0), form) == [["A1<|im_end|>", 0.5]]
    assert values(weighed(0, None), form) == [["A1<|im_end|>", 1]]


def test_a_list_of_the_record_goes_with_the_tokens():
    tokenizer = byte_tokenizer(CHATML, size=256)  # A, 0, the end; A, 1, the end
    record = weighed(0.5, 2, weight=[1, 2, 3, 4, 5, 6])
    full = encode(tokenizer, record, 512, ("weight",))
    assert full.inputs["weight"][full.supervised].tolist() == [0.5, 1, 1.5, 8, 10, 12]
    for seq_length in range(1, len(full.input_ids)):
        cut = encode(tokenizer, record, seq_length, ("weight",))
        assert cut.inputs["weight"].tolist() == full.inputs["weight"][: seq_length + 1].tolist()
    # other side inputs are not multiplied
    both = encode(tokenizer, record | {"old_log_prob": -3}, 512, ("old_log_prob", "weight"))
    assert set(both.inputs["old_log_prob"][both.supervised]) == {-3}


def test_tool_calls_have_weights_too():
    form = CHATML.replace("{{ m.content }}<|", "{{ m.content }}{% for c in m.tool_calls or [] %}"
                          "{{ c.function.name ~ (c.function.arguments | tojson) }}{% endfor %}<|")  # fmt: skip
    record = weighed(0.5, 2)
    record["messages"][1] |= {"content": "", "tool_calls": [CALL]}
    assert values(record, form) == [["f{}<|im_end|>", 0.5], ["A1<|im_end|>", 2]]


def test_a_record_without_any_weight_is_still_refused():
    tokenizer = byte_tokenizer(CHATML)
    with pytest.raises(ValueError, match='the objective needs "weight", .* to the record or its answers'):
        encode(tokenizer, chat("u:Hi", "a:One"), 512, ("weight",))
    silent = chat("u:Hi", "a:One")
    silent["messages"][0]["weight"] = 0  # of a question: no weight of tokens
    with pytest.raises(ValueError, match='the objective needs "weight"'):
        encode(tokenizer, silent, 512, ("weight",))
    with pytest.raises(ValueError, match='"weight": expected a finite number'):
        encode(tokenizer, weighed(0.5, weight="x"), 512, ("weight",))


def test_generation_blocks_of_another_number_tell_no_weights_apart():
    tokenizer = byte_tokenizer(UNKNOWN)
    record = weighed(0.5, 2)
    record["messages"] += chat("u:Hm", "a:")["messages"]
    with pytest.raises(
        ValueError, match="3 assistant messages, but 2 .* answer that has another weight cannot be told"
    ):
        encode(tokenizer, record, 512, ("weight",))
    # nobody asks for the weights, or all are the same
    assert encode(tokenizer, record, 512).weighted
    record["messages"][1]["weight"] = 2
    assert values(record, UNKNOWN) == [["A0<|im_end|>", 2], ["A1<|im_end|>", 2]]
    record["messages"][1]["weight"] = 0
    with pytest.raises(ValueError, match="answer that is not to be trained on cannot be told"):
        encode(tokenizer, record, 512, ("weight",))


@pytest.mark.parametrize(
    ("weights", "weighted"),
    [((0.5, None), True), ((1, 2), True), ((0, 1), False), ((True, 1.0), False), ((None, None), False)],
)
def test_a_weight_that_nobody_reads_is_told(weights, weighted):
    tokenizer = byte_tokenizer(CHATML)
    record = weighed(*weights)
    plain = encode(tokenizer, weighed(*[bool(w) if w in (0, 1) else None for w in weights]), 512)
    sample = encode(tokenizer, record, 512)  # as score, cache-teacher and inspect read it
    assert sample.weighted == weighted and not plain.weighted
    assert sample.input_ids.tolist() == plain.input_ids.tolist()
    assert sample.supervised.tolist() == plain.supervised.tolist()


def test_training_items_hold_the_weights_where_their_tokens_are_labels(tmp_path):
    path, tokenizer = tmp_path / "d.jsonl", byte_tokenizer(CHATML, size=256)
    path.write_text(json.dumps(weighed(0.5, 2)))
    file = JsonlFile(path)
    item = padded_rows(file, tokenizer, 64, num_rows=1, names=("weight",))[0]
    trained = item["labels"] != -100
    assert item[batch_key("weight")][trained].tolist() == [0.5] * 3 + [2] * 3
    assert not item[batch_key("weight")][~trained].any()
