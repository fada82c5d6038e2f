"""Conversations with tools under the families' templates: exactly which characters are trained on.

An answer must begin where transformers' own rendering of the messages before it ends, with the generation prompt; what
it is, is written out here.
"""

import copy
import datetime

import numpy as np
import pytest
from small_tokenizers import CHATML, byte_tokenizer
from tool_templates import FAMILIES, family_tokenizer

from qtarget_megatron.data import SampleNotes, canonical, encode
from qtarget_megatron.data.template import ChatTemplate

PARAMETERS = {"type": "object", "properties": {"x": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "f", "description": "é <d>", "parameters": PARAMETERS}}]
ARGUMENTS = '{"x": "é", "n": [1, {}]}'
CALL = {"id": "abcdefgh1", "type": "function", "function": {"name": "f", "arguments": {"x": "é", "n": [1, {}]}}}
OTHER = {"id": "abcdefgh2", "type": "function", "function": {"name": "g", "arguments": {}}}
RESULT = {"role": "tool", "name": "f", "tool_call_id": "abcdefgh1", "content": '{"a": "é \\"q\\""}\n'}

SYSTEM, USER = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi é"}
DONE = {"role": "assistant", "content": "Done 👧."}
MORE, AGAIN = {"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes."}


def calling(*calls, content=None, **fields):
    return {"role": "assistant", "content": content, "tool_calls": copy.deepcopy(list(calls or [CALL])), **fields}


def talk(*messages):
    return {"messages": list(messages), "tools": TOOLS}


WHOLE = talk(SYSTEM, USER, calling(), RESULT, DONE)

DEEPSEEK_CALL = (
    f"<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{ARGUMENTS}\n```<｜tool▁call▁end｜>"
)
# What a call is in each family, of another one behind it, its end, an answer behind a result, and one at the end.
CALLS = {
    "qwen2.5": (f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>',
                '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "<|im_end|>", "{}", "{}"),
    "qwen3": (f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>',
              '\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>', "<|im_end|>", "{}",
              "<think>\n\n</think>\n\n{}"),
    "llama3": (f'{{"name": "f", "parameters": {ARGUMENTS}}}', None, "<|eot_id|>", "{}", "{}"),
    "llama3 system": (f'{{"name": "f", "parameters": {ARGUMENTS}}}', None, "<|eot_id|>", "{}", "{}"),
    "mistral": (f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}, "id": "abcdefgh1"}}',
                ', {"name": "g", "arguments": {}, "id": "abcdefgh2"}', "</s>", " {}", " {}"),
    "mistral small": (f'[TOOL_CALLS] [{{"name": "f", "arguments": {ARGUMENTS}, "id": "abcdefgh1"}}',
                      ', {"name": "g", "arguments": {}, "id": "abcdefgh2"}', "</s>", " {}", " {}"),
    "deepseek-v3": (DEEPSEEK_CALL,
                    "\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>g\n```json\n{}\n```<｜tool▁call▁end｜>",
                    "<｜end▁of▁sentence｜>", "{}", "{}"),
}  # fmt: skip
CLOSED = {"mistral": "]", "mistral small": "]", "deepseek-v3": "<｜tool▁calls▁end｜>"}


def call_text(family, *, two=False):
    call, other, end, *_ = CALLS[family]
    return f"{call}{other if two else ''}{CLOSED.get(family, '')}{end}"


def answer_text(family, message, *, last=True):
    *_, end, within, at_end = CALLS[family]
    return (at_end if last else within).format(message["content"]) + end


def trained(tokenizer, record):
    """[place of the first character, text] of each unbroken run of supervised tokens, and the whole text."""
    sample = encode(tokenizer, record, 8192)
    assert sample.unended == 0 and not sample.truncated
    edges = np.flatnonzero(np.diff(np.concatenate(([0], sample.supervised, [0])))).reshape(-1, 2)
    ids = sample.input_ids
    runs = [(len(tokenizer.decode(ids[:begin])), tokenizer.decode(ids[begin:end])) for begin, end in edges]
    return runs, tokenizer.decode(ids)


def rendered(family, tokenizer, messages, **options):
    """By transformers, from messages in the form that the family's template takes."""
    messages = copy.deepcopy(messages)
    for message in messages:
        message.pop("weight", None)
        for call in message.get("tool_calls") or ():
            if family.startswith("deepseek"):  # which adds arguments to a text
                call["function"]["arguments"] = ARGUMENTS if call["function"]["name"] == "f" else "{}"
        if message.get("tool_calls") and message["content"] is None:  # transformers drops what is null
            message["content"] = ""
    return tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False, **options)


def prompts(family, tokenizer, record, *which):
    """What inference reads before each of these messages."""
    return [rendered(family, tokenizer, record["messages"][:i], add_generation_prompt=True) for i in which]


def assert_trained(family, record, expected):
    """expected: message -> what is trained of it, in a text that is transformers' own."""
    tokenizer = family_tokenizer(family)
    runs, text = trained(tokenizer, record)
    assert text == rendered(family, tokenizer, record["messages"])
    begins = [len(prompt) for prompt in prompts(family, tokenizer, record, *expected)]
    assert runs == list(zip(begins, expected.values(), strict=True))
    for prompt, answer in zip(prompts(family, tokenizer, record, *expected), expected.values(), strict=True):
        assert text.startswith(prompt + answer)


# ---- what is trained

WITH_SYSTEM = [family for family in CALLS if family != "mistral"]


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_a_call_and_the_answer_behind_its_result_are_trained(family):
    assert_trained(family, WHOLE, {2: call_text(family), 4: answer_text(family, DONE)})


@pytest.mark.parametrize("family", CALLS)
def test_without_a_system_message(family):
    record = talk(USER, calling(), RESULT, DONE)
    assert_trained(family, record, {1: call_text(family), 3: answer_text(family, DONE)})


@pytest.mark.parametrize("family", [family for family, (_, other, *_) in CALLS.items() if other])
def test_several_calls_at_once_and_their_results(family):
    record = talk(USER, calling(CALL, OTHER), RESULT, {**RESULT, "tool_call_id": "abcdefgh2", "content": "42"}, DONE)
    assert_trained(family, record, {1: call_text(family, two=True), 4: answer_text(family, DONE)})


@pytest.mark.parametrize("family", [family for family in WITH_SYSTEM if family != "deepseek-v3"])
def test_a_second_round_of_calls(family):
    second = {**RESULT, "content": " no line break "}
    record = talk(SYSTEM, USER, calling(), RESULT, calling(), second, DONE)
    expected = {2: call_text(family), 4: call_text(family), 6: answer_text(family, DONE)}
    assert_trained(family, record, expected)


@pytest.mark.parametrize("family", [family for family in WITH_SYSTEM if family != "mistral small"])
def test_a_question_behind_the_answer(family):
    record = talk(SYSTEM, USER, calling(), RESULT, DONE, MORE, AGAIN)
    expected = {2: call_text(family), 4: answer_text(family, DONE, last=False), 6: answer_text(family, AGAIN)}
    assert_trained(family, record, expected)


@pytest.mark.parametrize(("family", "between"), [("qwen2.5", "\n"), ("qwen3", "\n"), ("deepseek-v3", "")])
def test_text_beside_a_call(family, between):
    record = talk(SYSTEM, USER, calling(content="Let me see."), RESULT, DONE)
    expected = {2: f"Let me see.{between}{call_text(family)}", 4: answer_text(family, DONE)}
    assert_trained(family, record, expected)


@pytest.mark.parametrize("family", WITH_SYSTEM)
def test_a_record_that_ends_with_a_call(family):
    thinking = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    assert_trained(family, talk(SYSTEM, USER, calling()), {2: thinking + call_text(family)})


def test_reasoning_goes_with_calls_and_answers():
    record = talk(SYSTEM, USER, calling(reasoning_content="f knows"), RESULT, {**DONE, "reasoning_content": "It did."})
    expected = {
        2: f"<think>\nf knows\n</think>\n\n{call_text('qwen3')}",
        4: "<think>\nIt did.\n</think>\n\nDone 👧.<|im_end|>",
    }
    assert_trained("qwen3", record, expected)


@pytest.mark.parametrize("family", CALLS)
@pytest.mark.parametrize(
    "call",
    [
        {"id": CALL["id"], "type": "function", "function": {"name": "f", "arguments": ARGUMENTS}},
        {"id": CALL["id"], "function": CALL["function"]},
        {"id": CALL["id"], **CALL["function"]},
        {"name": "f", "arguments": ARGUMENTS, "id": CALL["id"]},
    ],
    ids=["text", "no type", "bare", "bare text"],
)
def test_a_call_may_be_written_in_any_form_that_data_have(family, call):
    tokenizer = family_tokenizer(family)
    runs, text = trained(tokenizer, talk(USER, calling(call), RESULT, DONE))
    assert (runs, text) == trained(tokenizer, talk(USER, calling(), RESULT, DONE))
    assert runs[0][1] == call_text(family)


@pytest.mark.parametrize("family", CALLS)
def test_a_conversation_of_sharegpt_s_form_is_the_same(family):
    conversations = [
        {"from": "human", "value": "Hi é"},
        {"from": "function_call", "value": f'{{"name": "f", "arguments": {ARGUMENTS}, "id": "abcdefgh1"}}'},
        {"from": "observation", "value": RESULT["content"], "tool_call_id": "abcdefgh1"},
        {"from": "gpt", "value": DONE["content"]},
    ]
    tokenizer = family_tokenizer(family)
    record = canonical({"conversations": conversations, "tools": [TOOLS[0]["function"]]})
    assert trained(tokenizer, record) == trained(tokenizer, talk(USER, calling(), RESULT, DONE))


# ---- templates that write a conversation otherwise than its beginnings


def test_mistral_s_system_text_goes_into_the_last_question_of_a_prompt():
    """It is in what inference reads, and in no conversation that goes on."""
    tokenizer = family_tokenizer("mistral")
    with pytest.raises(ValueError, match="message 2: this chat template rewrites earlier turns"):
        encode(tokenizer, WHOLE, 8192)
    for messages, answer in (
        ([SYSTEM, USER, DONE], " Done 👧.</s>"),
        ([SYSTEM, USER, calling()], call_text("mistral")),
        ([SYSTEM, USER, {**DONE, "weight": 0}, MORE, AGAIN], " Yes.</s>"),
        ([SYSTEM, USER, calling(weight=0), RESULT, DONE], " Done 👧.</s>"),
    ):
        record = talk(*messages)
        (prompt,) = prompts("mistral", tokenizer, record, len(messages) - 1)
        assert trained(tokenizer, record) == ([(len(prompt), answer)], prompt + answer)
        assert ("Be brief." in prompt) == (messages[-2]["role"] == "user")
    # so do its tools
    with pytest.raises(ValueError, match="message 1: this chat template rewrites earlier turns"):
        encode(tokenizer, talk(USER, calling(), RESULT, DONE, MORE, AGAIN), 8192)


def test_deepseek_s_calls_behind_results_are_written_otherwise_than_they_are_asked_for():
    """With the header of an answer, and without the end of the results that the prompt has."""
    tokenizer = family_tokenizer("deepseek-v3")
    record = talk(USER, calling(), RESULT, calling(), RESULT, DONE)
    with pytest.raises(ValueError, match="message 3: this chat template rewrites earlier turns"):
        encode(tokenizer, record, 8192)
    alone = talk(USER, calling(weight=0), RESULT, calling())
    with pytest.raises(ValueError, match="message 3: this chat template rewrites earlier turns"):
        encode(tokenizer, alone, 8192)
    record["messages"][3]["weight"] = 0
    assert_trained("deepseek-v3", record, {1: call_text("deepseek-v3"), 5: answer_text("deepseek-v3", DONE)})


def test_what_leads_to_the_answer_must_be_the_same_behind_a_prompt():
    form = CHATML.replace("<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role ~ (loop.length if loop.last) }}\n")
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode(byte_tokenizer(form), talk(SYSTEM, USER, DONE), 512)


def test_r1_trains_answers_with_their_thinking_and_answers_behind_results():
    tokenizer = family_tokenizer("deepseek-r1")
    end = "<｜end▁of▁sentence｜>"
    for messages, answer in (
        ([SYSTEM, USER, {**DONE, "content": "<think>\nhm\n</think>\n\nDone 👧."}], f"hm\n</think>\n\nDone 👧.{end}"),
        ([SYSTEM, USER, {**DONE, "reasoning_content": "hm"}], f"hm\n</think>\n\nDone 👧.{end}"),
        # its prompt behind a result opens nothing
        ([SYSTEM, USER, calling(weight=0), RESULT, DONE], f"Done 👧.{end}"),
    ):
        record = talk(*messages)
        (prompt,) = prompts("deepseek-r1", tokenizer, record, len(messages) - 1)
        assert trained(tokenizer, record) == ([(len(prompt), answer)], prompt + answer)
    # calls are written where the prompt has opened the thinking
    for record in (WHOLE, talk(SYSTEM, USER, calling()), talk(SYSTEM, USER, calling(content="a</think>b"))):
        with pytest.raises(
            ValueError, match="message 2: this chat template's generation prompt opens a thinking block"
        ):
            encode(tokenizer, record, 8192)


# ---- templates that leave out calls or tools


@pytest.mark.parametrize("family", ["smollm3", "smollm3 bare"])
def test_smollm3_takes_calls_as_content(family):
    tokenizer = family_tokenizer(family)
    with pytest.raises(ValueError, match="message 2: .* does not write its tool calls .* or write them as content"):
        encode(tokenizer, WHOLE, 8192)
    text = f'<tool_call>\n{{"name": "f", "arguments": {ARGUMENTS}}}\n</tool_call>'
    record = talk(SYSTEM, USER, {"role": "assistant", "content": text}, RESULT, DONE)
    runs, whole = trained(tokenizer, record)
    starts = [len(prompt) for prompt in prompts(family, tokenizer, record, 2, 4)]
    assert whole == rendered(family, tokenizer, record["messages"])
    # its own blocks hold the header and the line break of the turn
    header, behind = ("<|im_start|>assistant\n", "\n") if family == "smollm3" else ("", "")
    assert runs == [
        (start - len(header), f"{header}{answer}<|im_end|>{behind}")
        for start, answer in zip(starts, (text, "Done 👧."), strict=True)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_tools_that_the_template_does_not_look_at_are_told(family):
    tokenizer = family_tokenizer(family)
    record = talk(USER, {**DONE, "reasoning_content": "hm"} if family == "deepseek-r1" else DONE)
    sample = encode(tokenizer, record, 8192)
    written = '"é <d>"' in tokenizer.decode(sample.input_ids)
    assert sample.leaves_tools == (not written)
    assert written == family.startswith(("qwen", "llama", "mistral"))
    for nothing in ([], None, "[]"):
        assert not encode(tokenizer, canonical(record | {"tools": nothing}), 8192).leaves_tools


def test_notes_tell_of_tools_that_are_left_out():
    notes = SampleNotes()
    for record in (talk(USER, DONE), {"messages": [USER, DONE]}):
        notes.add(encode(family_tokenizer("deepseek-v3"), record, 8192))
    (line,) = notes.lines(None)
    assert line.startswith("WARNING: the tools of 1 samples are not in their text")


def test_tools_are_read_where_a_template_takes_them():
    def leaves(form):
        return ChatTemplate(byte_tokenizer(form), TOOLS, datetime.date.today()).leaves_tools

    assert not leaves("{% if not tools is defined %}{% set tools = none %}{% endif %}{{ tools }}")
    assert not leaves("{% set tools = tools or [] %}{{ tools }}")
    assert leaves("<tools>{{ xml_tools }}{# tools #}{% macro f(tools) %}{{ tools }}{% endmacro %}{{ f([]) }}")
