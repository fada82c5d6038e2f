"""Templates in the manner of those that models ship: what is a target, against marks set by hand, and what is refused.

Expected texts are written out from the templates and conversations, never taken from the code.
"""

import datetime
import json
import time

import numpy as np
import pytest
from small_tokenizers import CHATML, GENERATION, SPECIAL, THINKING, byte_tokenizer, chat
from tokenizers import AddedToken

from qtarget_megatron.data import SampleNotes, encode, template
from qtarget_megatron.data.template import ChatTemplate


def runs(tokenizer, record, **options):
    """The text of each unbroken run of supervised tokens."""
    sample = encode(tokenizer, record, 4096, **options)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], sample.supervised, [0]))))
    return [tokenizer.decode(sample.input_ids[begin:end]) for begin, end in edges.reshape(-1, 2)]


def refusal(tokenizer, record):
    with pytest.raises(ValueError) as caught:
        encode(tokenizer, record, 4096)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- the end of turn

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}END{% endfor %}"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TALK = chat("s:S", "u:Hi", "a:One.", "u:And?", "a:Two", "u:So?")


def turns(end):
    return TURNS.replace("END", end) + PROMPT


def ended(template, eos="<|im_end|>", special=SPECIAL):
    return byte_tokenizer(template, eos=eos, special=special, size=256)


@pytest.mark.parametrize("blank", ["", " ", "\n", "\n\n", "\r\n", "\t", "\u00a0", "\u3000 \n"])
@pytest.mark.parametrize("behind", ["", "\n", " \n\n"])
def test_blanks_of_any_kind_lead_to_the_end_of_turn(blank, behind):
    tokenizer = ended(turns(f"{{{{ {json.dumps(blank)} }}}}<|im_end|>{{{{ {json.dumps(behind)} }}}}"))
    assert runs(tokenizer, TALK) == [f"One.{blank}<|im_end|>", f"Two{blank}<|im_end|>"]
    # at the end of the conversation as within it
    assert runs(tokenizer, chat("u:Hi", "a:One")) == [f"One{blank}<|im_end|>"]
    assert encode(tokenizer, TALK, 4096).unended == 0


NOT_SPECIAL = [*SPECIAL, AddedToken("<end>", special=False)]
OWN_TOKENS = turns("<|eot|>").replace(
    "<|im_start|>{{ m.role }}", "{{ {'user': '<|header|>', 'system': '<|bos|>'}.get(m.role, '<|im_start|>assistant') }}"
)


@pytest.mark.parametrize(
    ("template", "eos", "special", "end"),
    [
        # a run of closing tokens, up to the end of sequence
        (turns("<|eot|><|im_end|>"), "<|im_end|>", SPECIAL, "<|eot|><|im_end|>"),
        (turns("<|eot|><|im_end|><|header|>\n"), "<|im_end|>", SPECIAL, "<|eot|><|im_end|>"),
        (turns("\n<|eot|><|im_end|>\n"), "</s>", SPECIAL, "\n<|eot|><|im_end|>"),
        # the next turn begins right behind, with the token that begins every turn, or with one of its own
        (turns("<|eot|>"), "</s>", SPECIAL, "<|eot|>"),
        (OWN_TOKENS, "</s>", SPECIAL, "<|eot|>"),
        # an end that is a text, and one that is a text with a token
        (turns("### End\n"), "</s>", SPECIAL, "### End"),
        (turns("\n### End</s>\n"), "</s>", SPECIAL, "\n### End</s>"),
        # an added token that is not special
        (turns("<end>\n"), "</s>", NOT_SPECIAL, "<end>"),
        (turns("\n<end>"), "<end>", NOT_SPECIAL, "\n<end>"),
    ],
)
def test_end_of_turn_is_what_closes_an_answer_and_nothing_of_the_next_turn(template, eos, special, end):
    tokenizer = ended(template, eos, special)
    assert runs(tokenizer, TALK) == [f"One.{end}", f"Two{end}"]
    assert runs(tokenizer, chat("u:Hi", "a:One.")) == [f"One.{end}"]
    assert encode(tokenizer, TALK, 4096).unended == 0


def test_a_generation_prompt_that_is_always_written_is_no_end_of_turn():
    words = "{% for m in messages %}{{ m.role }}: {{ m.content }}%s\n{% endfor %}assistant: "
    for form, end in [
        (TURNS.replace("END", "<|eot|>\n") + "<|im_start|>assistant{{ '\\n' }}", "<|eot|>"),
        (TURNS.replace("END", "<|eot|>") + "<|im_start|>assistant{{ '\\n' }}", "<|eot|>"),
        (words.replace("%s", ""), ""),
        (words.replace("%s", " ### End"), " ### End"),
    ]:
        tokenizer = ended(form, "</s>")
        assert runs(tokenizer, chat("u:Hi", "a:One", "u:And?", "a:Two")) == [f"One{end}", f"Two{end}"], form
        assert runs(tokenizer, chat("u:Hi", "a:One", "u:And?")) == [f"One{end}"], form


def test_deepseek_coder_form():
    form = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        "{{ '### Instruction:\\n' + m.content + '\\n' }}{% else %}"
        "{{ '### Response:\\n' + m.content + '\\n<|EOT|>\\n' }}{% endif %}{% endfor %}{{ '### Response:\\n' }}"
    )
    tokenizer = byte_tokenizer(form, bos="<|bos|>", eos="<|EOT|>", special=["<|bos|>", "<|EOT|>"], size=256)
    record = chat("s:S\n", "u:Hi", "a:One.", "u:And?", "a:Two")
    assert runs(tokenizer, record) == ["One.\n<|EOT|>", "Two\n<|EOT|>"]
    assert encode(tokenizer, record, 4096).unended == 0


def test_answers_without_an_end_are_counted():
    two = chat("u:Hi", "a:One", "u:And?", "a:Two")
    last = turns("{% if loop.last and m.role == 'assistant' %}</s>{% endif %}\n")
    within = turns("{% if not loop.last or m.role == 'user' %}<|eot|>{% endif %}")
    excluded = GENERATION.replace("<|im_end|>{% endgen", "{% endgen").replace(
        "{% endgeneration %}", "{% endgeneration %}<|im_end|>"
    )
    for text, expected, unended in [
        (turns("\n"), ["One", "Two"], 2),
        (turns(""), ["One", "Two"], 2),
        (last, ["One", "Two</s>"], 1),
        (within, ["One<|eot|>", "Two"], 1),
        (GENERATION, ["One<|im_end|>", "Two<|im_end|>"], 0),
        (excluded, ["One", "Two"], 2),
    ]:
        tokenizer = ended(text, "</s>")
        sample = encode(tokenizer, two, 4096)
        assert runs(tokenizer, two) == expected, text
        assert (sample.answers, sample.unended) == (2, unended), text
    # who is cut has no end to miss
    assert encode(ended(CHATML), chat("u:Hi", "a:One " * 9), 20).unended == 0
    assert encode(byte_tokenizer(eos=None), {"prompt": "a", "completion": "b"}, 9).unended == 1


def test_notes_speak_of_what_there_is_to_say():
    notes = SampleNotes()
    notes.add(encode(ended(turns("")), TALK, 4096))
    notes = notes + notes
    (line,) = notes.lines(None)
    assert "WARNING: no end of turn is trained in 4 of 4 answers" in line and "may not learn to stop" in line
    assert SampleNotes(answers=3).lines(None) == []


# ---- the date

DATED = (
    "{% if not date is defined %}{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}"
    "{% endif %}{% macro day() %}{{ strftime_now('%A %j') }}{% endmacro %}Today {{ date }}, {{ day() }}\n" + CHATML
)


def test_a_template_that_writes_the_date_writes_the_one_that_is_given():
    tokenizer = byte_tokenizer(DATED)
    record = chat("u:Hi", "a:One")
    for date, written in (((2024, 2, 29), "29 Feb 2024, Thursday 060"), ((2031, 12, 1), "01 Dec 2031, Monday 335")):
        sample = encode(tokenizer, record, 4096, date=datetime.date(*date))
        assert tokenizer.decode(sample.input_ids).startswith(f"Today {written}\n")
        assert sample.dated
    today = encode(tokenizer, record, 4096).input_ids.tolist()
    assert today in [encode(tokenizer, record, 4096, date=day).input_ids.tolist() for day in _today()]
    assert not encode(byte_tokenizer(CHATML), record, 4096).dated
    assert "2024-02-29" in SampleNotes(dated=1).lines(datetime.date(2024, 2, 29))[0]


def _today():
    day = datetime.date.today()
    return day, day - datetime.timedelta(days=1)


# ---- as transformers renders

TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>{{ m.content }}</tool_response>{% elif m.tool_calls %}"
    "{% if m.content %}{{ m.content }}\n{% endif %}{% for call in m.tool_calls %}{% set call = call.function or call %}"
    '{{ \'<tool_call>{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}"
    "{{ '}</tool_call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}" + PROMPT
)
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"x": "é", "n": [1, {}]}}}


def calling(message, *, answer="Done"):
    record = chat("u:Hi", "t:42", f"a:{answer}")
    record["messages"].insert(1, {"role": "assistant", **message})
    return {**record, "tools": [{"type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize("form", [CHATML, THINKING, GENERATION, DATED, TOOLS])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_conversation_is_rendered_as_transformers_renders_it(form, prompted):
    tokenizer = byte_tokenizer(form, bos="<|bos|>")
    messages = [*TALK["messages"], {"role": "assistant", "content": "<think>\nhm</think>Yes", "reasoning": "so"}]
    tools = [{"type": "function", "function": {"name": "é<"}}]
    theirs = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=prompted)
    assert theirs in [ChatTemplate(tokenizer, tools, day).render(messages, prompted) for day in _today()]


# ---- tool calls

DEEPSEEK = (
    "{% for m in messages %}{% if m.role == 'user' %}<|header|>{{ m.content }}{% elif m.role == 'tool' %}"
    "<|bos|>{{ m.content }}{% elif m.content is none %}<|/header|>{% for call in m.tool_calls %}"
    "{{ 'call ' + call.function.name + '\\n```json\\n' + call.function.arguments + '\\n```' }}{% endfor %}<|eot|></s>"
    "{% else %}<|/header|>{{ m.content + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|/header|>{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.tool_calls is defined %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('one call at a time') }}{% endif %}{% set call = m.tool_calls[0].function %}"
    '{{ \'<|header|>assistant<|/header|>\n\n{"name": "\' + call.name + \'", "parameters": \' }}'
    "{{ call.arguments | tojson }}{{ '}' }}<|eot|>{% else %}<|header|>{{ m.role }}<|/header|>\n\n"
    "{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|header|>assistant<|/header|>\n\n{% endif %}"
)
QWEN_CODER = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<function={{ call.function.name }}>\n{% for name, value in call.function.arguments | items %}"
    "<parameter={{ name }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>{% endfor %}<|im_end|>\n{% endfor %}"
    + PROMPT
)
ARGUMENTS = '{"x": "é", "n": [1, {}]}'


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": ""}])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize(
    ("form", "eos", "expected"),
    [
        (TOOLS, "<|im_end|>", f'<tool_call>{{"name": "f", "arguments": {ARGUMENTS}}}</tool_call><|im_end|>'),
        (LLAMA, "<|eot|>", f'{{"name": "f", "parameters": {ARGUMENTS}}}<|eot|>'),
        (DEEPSEEK, "</s>", f"call f\n```json\n{ARGUMENTS}\n```<|eot|></s>"),
        (
            QWEN_CODER,
            "<|im_end|>",
            "<function=f>\n<parameter=x>\né\n</parameter>\n<parameter=n>\n[1, {}]\n</parameter>\n</function><|im_end|>",
        ),
    ],
)
def test_tool_calls_are_targets_in_every_form_that_data_and_templates_have(form, eos, expected, text, content):
    if form is DEEPSEEK and content == {"content": ""}:
        content = {"content": None}  # such a template writes the calls of messages without content only
    call = json.loads(json.dumps(CALL))
    if text:
        call["function"]["arguments"] = ARGUMENTS
    if form is QWEN_CODER:
        expected = expected.replace("[1, {}]", "[1, {}]")
    tokenizer = byte_tokenizer(form, eos=eos, size=256)
    record = calling({**content, "tool_calls": [call]})
    end = {"<|im_end|>": "<|im_end|>", "<|eot|>": "<|eot|>", "</s>": "</s>"}[eos]
    assert runs(tokenizer, record) == [expected, f"Done{end}"]
    assert encode(tokenizer, record, 4096).unended == 0
    # as the last message of a record too
    record["messages"] = record["messages"][:2]
    assert runs(tokenizer, record) == [expected]


def test_tool_calls_with_text_several_at_once_and_without_arguments():
    tokenizer = byte_tokenizer(TOOLS, eos="<|im_end|>", size=256)
    calls = [CALL, {"name": "g", "arguments": {}}, {"function": {"name": "h"}}]
    written = "".join(
        f'<tool_call>{{"name": "{name}", "arguments": {arguments}}}</tool_call>'
        for name, arguments in (("f", ARGUMENTS), ("g", "{}"), ("h", "{}"))
    )
    record = calling({"content": "Let me see.", "tool_calls": calls})
    assert runs(tokenizer, record) == [f"Let me see.\n{written}<|im_end|>", "Done<|im_end|>"]
    record["messages"][1]["weight"] = 0
    assert runs(tokenizer, record) == ["Done<|im_end|>"]


def test_tool_calls_that_a_template_drops_or_changes_are_refused():
    record = calling({"content": None, "tool_calls": [CALL]})
    assert "message 1: this chat template does not write its tool calls" in refusal(byte_tokenizer(THINKING), record)
    # a call that is written, and text beside it that is not
    record["messages"][1]["content"] = "Let me see."
    assert "leaves out a part of the content" in refusal(byte_tokenizer(LLAMA, eos="<|eot|>"), record)
    twice = byte_tokenizer(
        TOOLS.replace("{% endfor %}{% else", "{{ m.tool_calls[0].function.name }}{% endfor %}{% else")
    )
    assert "once and as they came" in refusal(twice, record)
    for change, message in [
        ({"tool_calls": {}}, '"tool_calls": expected a list'),
        ({"tool_calls": [{"function": {"arguments": {}}}]}, '"name": expected a string, got null'),
        ({"tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "expected an object, or JSON text of one"),
        ({"tool_calls": [{"name": "f", "arguments": [1]}]}, '"arguments": expected an object, got a list'),
        ({"function_call": {"name": "f"}}, '"function_call" is the old form'),
    ]:  # fmt: skip
        assert message in refusal(byte_tokenizer(TOOLS), calling({"content": "a", **change}))


# ---- reasoning


def test_reasoning_that_the_template_leaves_out_is_refused():
    cases = [
        # reasoning of an earlier answer, in its own field or in the content, also before a mere question
        (THINKING, {"content": "One", "reasoning_content": "hm"}, "the reasoning"),
        (THINKING, {"content": "<think>hm</think>One"}, "the reasoning"),
        # a field that the template does not know
        (CHATML, {"content": "One", "reasoning_content": "hm"}, "the reasoning"),
        (CHATML, {"content": "One", "thinking": "hm"}, "the reasoning"),
        # the head of a content
        (CHATML.replace("{{ m.content }}", "{{ m.content.split('###')[-1] }}"), {"content": "plan ### One"}, "a part"),
        (GENERATION.replace("{{ m.content }}<", "{{ m.content[2:] }}<"), {"content": "One"}, "a part of the content"),
    ]
    for form, message, what in cases:
        record = chat("u:Hi", "a:", "u:So?")
        record["messages"][1].update(message)
        line = refusal(byte_tokenizer(form), record)
        assert f"message 1: this chat template leaves out {what}" in line and '"weight": 0' in line
        record["messages"][1]["weight"] = 0
        assert runs(byte_tokenizer(form), record) == []
    # as the last message it is written, whatever the data and the template call it
    for form in (THINKING, THINKING.replace("reasoning_content", "thinking")):
        for name in ("reasoning_content", "thinking", "reasoning"):
            record = chat("u:Hi", "a:One")
            record["messages"][1][name] = "hm"
            assert runs(byte_tokenizer(form), record) == ["<think>\nhm\n</think>\n\nOne<|im_end|>"], (form, name)


# As R1's: a prompt that opens the thinking, which no turn that is written has.
R1 = (
    "<|bos|>{% for m in messages %}{% if m.role == 'user' %}<|header|>{{ m.content }}{% else %}"
    "<|/header|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|/header|><think>\n{% endif %}"
)


def test_an_answer_goes_on_from_the_thinking_that_the_prompt_opens():
    tokenizer = byte_tokenizer(R1)
    thought = chat("u:Hi", "a:One")
    thought["messages"][1]["reasoning_content"] = "hm"
    for record in (chat("u:Hi", "a:<think>\nhm\n</think>\n\nOne"), chat("u:Hi", "a:hm\n</think>\n\nOne"), thought):
        assert runs(tokenizer, record) == ["hm\n</think>\n\nOne</s>"]
        sample = encode(tokenizer, record, 4096)
        assert sample.unended == 0
        # what inference reads is the beginning
        prompt = tokenizer.apply_chat_template(record["messages"][:1], tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(sample.input_ids) == f"{prompt}hm\n</think>\n\nOne</s>"
    several = chat("u:Hi", "a:One", "u:So?", "a:<think>\nhm\n</think>\n\nTwo")
    assert "opens a thinking block" in refusal(tokenizer, several)
    several["messages"][1]["weight"] = 0
    assert runs(tokenizer, several) == ["hm\n</think>\n\nTwo</s>"]
    assert tokenizer.decode(encode(tokenizer, several, 4096).input_ids).startswith(
        "<|bos|><|header|>Hi<|/header|>One</s><|header|>So?<|/header|><think>\n"
    )
    line = refusal(tokenizer, chat("u:Hi", "a:One"))
    assert "opens a thinking block" in line and "with its thinking in it" in line


# ---- what a message says of itself


@pytest.mark.parametrize("form", [CHATML, GENERATION])
@pytest.mark.parametrize("field", ["weight", "loss", "train", "training", "train_on_turn"])
def test_an_answer_can_be_left_out(form, field):
    tokenizer = byte_tokenizer(form)
    record = chat("u:Hi", "a:One", "u:And?", "a:Two")
    plain = encode(tokenizer, record, 4096).input_ids.tolist()
    for off, on in ((0, 1), (0.0, 1.0), (False, True)):
        record["messages"][1][field], record["messages"][3][field] = off, on
        assert runs(tokenizer, record) == ["Two<|im_end|>"]
        record["messages"][1][field], record["messages"][3][field] = None, off
        assert runs(tokenizer, record) == ["One<|im_end|>"]
    # the template does not see it, and the sample's weight is another thing
    assert encode(tokenizer, record, 4096).input_ids.tolist() == plain
    sample = encode(tokenizer, {**record, "weight": 0.5}, 4096, ("weight",))
    assert set(sample.inputs["weight"][sample.supervised]) == {0.5}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": -1}, '"weight": expected a number, 0 or more.* got -1'),
        ({"weight": "0.5"}, '"weight": expected a number, 0 or more.* got a string'),
        ({"weight": float("nan")}, "got NaN"),
        ({"weight": 10**400}, "got 10000"),
        ({"weight": 0.5, "train": False}, "weight and train contradict"),
        ({"loss": 0.5}, '"loss": expected 0 or 1, false or true.* got 0.5'),
        ({"loss": True, "weight": 0}, "weight and loss contradict"),
        ({"train": "no"}, '"train": expected 0 or 1, false or true'),
        ({"weight": 1, "train": False}, "weight and train contradict"),
        ({"train_detail": []}, '"train_detail" .* is not supported'),
        ({"role": "user", "train": True}, "only assistant messages are trained on"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, 'parts .* got a part of type "image_url"'),
        ({"content": None}, '"content": expected a string, got null'),
    ],
)
def test_what_cannot_be_heeded_is_refused(change, message):
    record = chat("u:Hi", "a:One")
    record["messages"][1].update(change)
    with pytest.raises(ValueError, match=f"message 1.*{message}"):
        encode(byte_tokenizer(CHATML), record, 64)


def test_text_parts_are_one_text_and_a_developer_is_a_system_where_the_template_knows_none():
    tokenizer = byte_tokenizer(CHATML)
    parts = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "One"}]},
        ]
    }
    plain = encode(tokenizer, chat("s:Be brief.", "u:Hi you", "a:One"), 64)
    sample = encode(tokenizer, parts, 64)
    assert sample.input_ids.tolist() == plain.input_ids.tolist()
    assert sample.supervised.tolist() == plain.supervised.tolist()
    knows = byte_tokenizer(CHATML + "{# developer #}")
    assert knows.decode(encode(knows, parts, 64).input_ids).startswith("<|im_start|>developer\nBe brief.")


# ---- bounds

DOUBLED = "{%% set ns = namespace(a=%s) %%}{%% for i in range(99) %%}{%% set ns.a = ns.a %s ns.a %%}{%% endfor %%}"


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "computes for more than"),
        ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(60) }}", "computes for more than"),
        ("{{ 'x' * 10000000000 }}", "more than .* characters"),
        (DOUBLED % ("'x'", "~"), "characters"),
        (DOUBLED % ("'x'", "+"), "characters"),
        (DOUBLED % ("[1]", "+"), "characters"),
        ("{{ (['x' * 999999] * 99999) | join }}", "characters"),
        ("{{ ''.join(['x' * 999999] * 99999) }}", "characters"),
        ("{{ ('x' * 999999) | replace('x', 'x' * 999999) }}", "characters"),
        ("{{ 'x' | center(9999999999) }}", "characters"),
        ("{{ 'x'.ljust(9999999999) }}", "characters"),
        ("{{ '%9999999999d' % 3 }}{{ '%9999999999d' | format(3) }}", "characters"),
        ("{{ '{:9999999999}'.format(3) }}", "characters"),
        ("{{ 9999999999 ** 9999999999 }}", "characters"),
        ("{% for i in range(99999) %}{{ 'x' * 99999 }}{% endfor %}", "characters"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "cannot render this conversation: RecursionError"),
        ("{{ 1 // 0 }}", "cannot render this conversation: ZeroDivisionError"),
        ("{% for %}", "is no Jinja template"),
    ],
)  # fmt: skip
def test_a_template_without_end_is_ended(monkeypatch, form, message):
    if "computes" in message:
        monkeypatch.setattr(template, "MAX_SECONDS", 0.1)
    begin = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        encode(byte_tokenizer(form), chat("u:Hi", "a:One"), 64)
    assert "\n" not in str(caught.value) and "template" in str(caught.value)
    assert time.process_time() - begin < 3


# ---- text that is none


def test_half_of_a_surrogate_pair_is_refused():
    for record in (chat("u:\ud83d", "a:One"), chat("u:Hi", "a:\ud83d"), {"prompt": "a\ud83d", "completion": "b"},
                   {"prompt": "a", "completion": "\udc00"}):  # fmt: skip
        assert "half of a surrogate pair" in refusal(byte_tokenizer(CHATML), record)
    whole = json.loads('{"prompt": "\\ud83d\\ude00", "completion": "b"}')
    assert runs(byte_tokenizer(CHATML), whole) == ["b</s>"]
