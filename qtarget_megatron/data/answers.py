"""Where the answers of a conversation lie in the text that a chat template writes."""

from __future__ import annotations

import contextlib
import datetime
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from qtarget_megatron.data.template import ChatTemplate, reasoning
from qtarget_megatron.data.tokenizer import added_ids, special_ids

_THINK = re.compile(r"</?think>")
_BLANK = re.compile(r"\s+")
_INSTEAD = "use a template with {% generation %} blocks or prompt/completion records"


@dataclass(frozen=True)
class Answer:
    """An answer's characters ``[begin, end)`` in the text, without the end of its turn.

    closing: what the template writes behind an answer at the end of a conversation, None where that is not known.
    kind: of what lies there: a content; a content in a generation block, whose end is the answer's, or one that is
    bare, ending as the content does; tool calls up to within the last one, or whole with the end of their turn.
    """

    begin: int
    end: int
    closing: str | None = None
    kind: Literal["content", "block", "bare block", "calls", "whole calls"] = "content"


@dataclass(frozen=True)
class Tokens:
    """ids and the characters ``[starts, ends)`` of a text's first tokens, int64 [n] each."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray


def locate(
    template: ChatTemplate, messages: list[dict[str, Any]], targets: Sequence[int], *, apart: bool = False
) -> tuple[str, list[Answer]]:
    """The text of a conversation, and the answers in it that targets names, by index of the message.

    The text is what the template writes; where this does not begin with the generation prompt of an answer that is the
    only target and the last message, what is read and generated in inference: that prompt and the answer.

    apart: there must be one answer for each target, in order, which generation blocks of another number cannot tell.

    Raises ValueError where an answer is not found, or not as a whole.
    """
    if template.has_blocks:
        return _in_blocks(template, messages, targets, apart)
    text = template.render(messages)
    if not targets:
        return text, []
    if targets[0] == 0:
        raise ValueError(
            'message 0: expected a system or user message first, got an assistant\'s: drop it, or give it "weight": 0'
        )
    filled = [i for i, m in enumerate(messages) if m.get("content") and m["content"].strip()]
    ends = _content_ends(template, messages, text, filled)
    plain = [i for i in targets if not messages[i].get("tool_calls")]
    if ends is None:  # the template examines other roles' contents: mark the answers alone
        ends = _content_ends(template, messages, text, plain)
    if ends is None or any(i not in ends for i in plain):
        raise ValueError(f"this chat template does not write every assistant message once and as it came: {_INSTEAD}")
    closing = _closing(template, messages, text, plain[-1], ends) if plain else None
    answers = []
    headers: dict[str, str] = {}  # role -> the template's text between such a message and an answer
    for i in targets:
        role, before = messages[i - 1]["role"], ends.get(i - 1)
        if messages[i - 1].get("tool_calls"):
            before = None
        if before is not None and role in headers and text.startswith(headers[role], before):
            begin = before + len(headers[role])  # saves rendering all earlier turns once more
        else:
            prefix = template.render(messages[:i], True)
            if not text.startswith(prefix):
                if i == len(messages) - 1 and targets == [i]:
                    return _behind_prompt(template, messages, text, ends, prefix, closing)
                raise ValueError(_rewritten(i, prefix, text))
            begin = len(prefix)
            if before is not None and before <= begin:
                headers[role] = text[before:begin]
        answers.append(_answer(template, messages, i, text, begin, ends, closing))
    return text, answers


def _answer(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    i: int,
    text: str,
    begin: int,
    ends: dict[int, int],
    closing: str | None,
) -> Answer:
    """Answer i, which begins there."""
    if messages[i].get("tool_calls"):
        answer = _calls(template, messages, i, text, begin)
    else:
        answer = Answer(begin, ends[i], closing)
    _check_whole(messages, i, text[begin : answer.end])
    return answer


def _in_blocks(
    template: ChatTemplate, messages: list[dict[str, Any]], targets: Sequence[int], apart: bool
) -> tuple[str, list[Answer]]:
    # The blocks' characters, not apply_chat_template's token mask: that one runs on to the end of the conversation when
    # a block ends in a character that no token covers.
    text, blocks = template.render_blocks(messages)
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    known = len(blocks) == len(replies)
    left_out = any(i not in targets and (messages[i].get("content") or "").strip() for i in replies)
    if not known and (apart or left_out):
        raise ValueError(
            f"{len(replies)} assistant messages, but {len(blocks)} {{% generation %}} blocks in this chat template: an "
            f"answer that {'is not to be trained on' if left_out else 'has another weight'} cannot be told apart; drop "
            "its weight, loss or train field"
        )
    answers = []
    for i, (begin, end) in zip(replies if known else [None] * len(blocks), blocks, strict=True):
        if i is None or i in targets:
            if i is not None:
                _check_whole(messages, i, text[begin:end])
                for call in messages[i].get("tool_calls") or ():
                    if call.get("function", call)["name"] not in text[begin:end]:
                        raise ValueError(_no_calls(i))
            content = (messages[i].get("content") or "").rstrip() if i is not None else ""
            bare = content and text[begin:end].rstrip().endswith(content)
            answers.append(Answer(begin, end, kind="bare block" if bare else "block"))
    return text, answers


def _rewritten(i: int, prefix: str, text: str) -> str:
    if prefix.rstrip().endswith("<think>") and text.startswith(prefix.rstrip().removesuffix("<think>")):
        return (
            f"message {i}: this chat template's generation prompt opens a thinking block, which it does not write in "
            'an answer: make this the record\'s last message and give all other answers "weight": 0, with its '
            'thinking in it ("<think>\\n...\\n</think>\\n\\nanswer", or reasoning_content), or use prompt/completion '
            "records"
        )
    return (
        f"message {i}: this chat template rewrites earlier turns (up to here the conversation is not the beginning of "
        'the whole one): use one answer per record, or "weight": 0 for all but the last, a template with '
        "{% generation %} blocks or prompt/completion records"
    )


def _behind_prompt(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    text: str,
    ends: dict[int, int],
    prefix: str,
    closing: str | None,
) -> tuple[str, list[Answer]]:
    """The last message as the answer to the prompt of inference (prefix), with which the whole text does not begin."""
    i = len(messages) - 1
    if prefix.rstrip().endswith("<think>") and not messages[i].get("tool_calls"):
        return _after_open_thinking(messages, i, text, ends, prefix, closing)
    # What leads from the message before to the answer must be the same in both.
    end = (_content_ends(template, messages[:i], prefix, [i - 1], True) or {}).get(i - 1) if i - 1 in ends else None
    if end is None or not text.startswith(prefix[end:], ends[i - 1]):
        raise ValueError(_rewritten(i, prefix, text))
    begin = ends[i - 1] + len(prefix) - end
    answer = _answer(template, messages, i, text, begin, ends, closing)
    further = len(prefix) - begin
    return prefix + text[begin:], [replace(answer, begin=answer.begin + further, end=answer.end + further)]


def _after_open_thinking(
    messages: list[dict[str, Any]], i: int, text: str, ends: dict[int, int], prefix: str, closing: str | None
) -> tuple[str, list[Answer]]:
    """The prompt of inference, the thinking that goes on from its ``<think>``, the answer and the template's end."""
    content, thought = messages[i]["content"], reasoning(messages[i])
    if thought and "</think>" not in content:
        content = f"{thought.strip()}\n</think>\n\n{content}"
    if "</think>" not in content:
        raise ValueError(_rewritten(i, prefix, text))
    blanks = prefix[len(prefix.rstrip()) :]
    rest = content.lstrip().removeprefix("<think>").removeprefix(blanks)
    begin, end = len(prefix), len(prefix) + len(rest)
    return f"{prefix}{rest}{text[ends[i] :]}", [Answer(begin, end, closing)]


def _check_whole(messages: list[dict[str, Any]], i: int, written: str) -> None:
    """ValueError unless what the template writes of an answer holds its reasoning and all of its content."""
    content, thought = messages[i].get("content") or "", reasoning(messages[i])
    if not thought and content.strip() in written:
        return
    found, position = _BLANK.sub("", _THINK.sub("", written)), 0
    parts = {"reasoning": [thought], "content": _THINK.split(content)}
    for name, pieces in parts.items():
        for piece in pieces:
            solid = _BLANK.sub("", piece)
            where = found.find(solid, position)
            if where < 0:
                last = i == len(messages) - 1
                what = "the reasoning" if name == "reasoning" or len(pieces) > 1 else f"a part of the {name}"
                instead = (
                    "write it in the form that the template takes, or drop it"
                    if last
                    else 'use one answer per record, or give this message "weight": 0 (then it is context only)'
                )
                raise ValueError(f"message {i}: this chat template leaves out {what} of this answer: {instead}")
            position = where + len(solid)


def _mark(text: str) -> str:
    return next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)


def _content_ends(
    template: ChatTemplate,
    messages: list[dict[str, Any]],
    text: str,
    which: list[int],
    generation_prompt: bool = False,
) -> dict[int, int] | None:
    """Message -> where its content ends in ``text``, with the blanks behind it, for ``which``.

    Without the messages that the template drops or repeats; None if it looks at the marks.
    A mark set behind a content appears in a second rendering: searching for the content would stop
    too early at an answer that its own thinking quotes.
    """
    mark = _mark(text)
    marked, blanks = [dict(message) for message in messages], {}
    for i in which:
        content = messages[i]["content"]
        solid = content.rstrip()  # the mark goes before the blanks, which many templates strip
        blanks[i] = content[len(solid) :]
        marked[i]["content"] = f"{solid}{mark}{i}{mark}{blanks[i]}"
    pieces = re.split(f"{mark}([0-9]+){mark}", template.render(marked, generation_prompt))
    if "".join(pieces[::2]) != text:
        return None
    found = [int(number) for number in pieces[1::2]]
    positions = np.cumsum([len(piece) for piece in pieces[:-1:2]]).tolist()
    return {
        i: end + (len(blanks[i]) if text.startswith(blanks[i], end) else 0)
        for i, end in zip(found, positions, strict=True)
        if found.count(i) == 1
    }


def _closing(
    template: ChatTemplate, messages: list[dict[str, Any]], text: str, i: int, ends: dict[int, int]
) -> str | None:
    """What the template writes behind answer i at the end of a conversation; None where that is not to be seen."""
    if i == len(messages) - 1:
        return text[ends[i] :]
    mark = _mark(text)
    try:
        pieces = template.render([*messages[:i], {"role": "assistant", "content": mark}]).split(mark)
    except ValueError:
        return None
    return pieces[1] if len(pieces) == 2 else None


def _no_calls(i: int) -> str:
    return (
        f"message {i}: this chat template does not write its tool calls once and as they came: use a template that "
        "knows tool calls, or write them as content"
    )


def _calls(template: ChatTemplate, messages: list[dict[str, Any]], i: int, text: str, begin: int) -> Answer:
    """The answer with tool calls that begins there: up to the end of the last call, or of the turn where it is seen."""
    mark = _mark(text)
    calls = messages[i]["tool_calls"]

    def rendered(changed: list[dict[str, Any]]) -> str:
        return template.render([*messages[:i], {**messages[i], "tool_calls": changed}, *messages[i + 1 :]])

    named = rendered([_changed(call, name=f"{call.get('function', call)['name']}{mark}") for call in calls])
    if named.count(mark) != len(calls) or named.replace(mark, "") != text:
        raise ValueError(_no_calls(i))
    # One argument more in the last call: what lies behind it is the same in both texts.
    arguments = calls[-1].get("function", calls[-1])["arguments"]
    if isinstance(arguments, str):
        last = arguments.rstrip().rstrip("}").rstrip()
        more: Any = f'{last}{"" if last == "{" else ", "}"{mark}": "{mark}"}}'
    else:
        more = {**arguments, mark: mark}
    argued = rendered([*calls[:-1], _changed(calls[-1], arguments=more)])
    same = len(os.path.commonprefix([text[::-1], argued[::-1]]))
    if argued.count(mark) != 2 or len(os.path.commonprefix([text, argued])) + same < len(text):
        raise ValueError(_no_calls(i))
    end = max(len(text) - same, begin)
    whole = template.render(messages[: i + 1])
    if text.startswith(whole) and len(whole.rstrip()) >= end:
        return Answer(begin, len(whole.rstrip()), kind="whole calls")
    return Answer(begin, end, kind="calls")


def _changed(call: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**call, "function": {**call["function"], **changes}} if "function" in call else {**call, **changes}


def turn_end(tokenizer: Any, template: ChatTemplate, text: str, tokens: Tokens, answer: Answer) -> int | None:
    """Where the end of an answer's turn ends in the text; None where the template writes none that can be trained.

    It is what the template writes behind an answer: blanks, then a run of added tokens, at most up to the
    end-of-sequence token, or a text. Tokens that begin the next turn are never among them.
    """
    added, eos = added_ids(tokenizer), tokenizer.eos_token_id
    prompt, opening = _openings(tokenizer, template.source)
    ids, starts, ends = tokens.ids, tokens.starts, tokens.ends

    def closes(token: int) -> bool:
        return ids[token] == eos or (int(ids[token]) in added and int(ids[token]) not in opening)

    if answer.kind == "calls":
        special = special_ids(tokenizer)
        behind = range(int(np.searchsorted(ends, answer.end, side="right")), len(ids))
        return next((int(ends[t]) for t in behind if int(ids[t]) in special and closes(t)), None)
    following, position = _next_token(text, tokens, answer.end)
    if answer.kind != "content":
        last = int(np.searchsorted(ends, answer.end, side="right")) - 1
        if last >= 0 and closes(last):
            return answer.end
        excluded = following is not None and starts[following] <= position and closes(following)
        return None if excluded or answer.kind == "bare block" else answer.end
    if following is None:
        return None
    closing = answer.closing or ""
    closing = closing.removesuffix(prompt)
    stop = answer.end + len(os.path.commonprefix([closing, text[answer.end : answer.end + len(closing)]]))
    if int(ids[following]) in added and starts[following] <= position:
        run: list[int] = []
        for token in range(following, len(ids)):
            if not closes(token) or (run and (starts[token] != ends[token - 1] or ids[token - 1] == eos)):
                break
            run.append(token)
        # Beyond the closing that is known, only what leads to the end-of-sequence token belongs to the turn; where none
        # is known, the first token.
        if run and ids[run[-1]] != eos:
            run = [token for token in run if ends[token] <= stop] or ([] if closing.strip() else run[:1])
        return int(ends[run[-1]]) if run else None
    # A text that the template writes behind every answer, perhaps with a token behind it.
    mark = next((t for t in range(following, len(ids)) if ends[t] <= stop and int(ids[t]) in added), None)
    if mark is not None and closes(mark):
        return int(ends[mark])
    tail = text[answer.end : stop if mark is None else int(starts[mark])].rstrip()
    return answer.end + len(tail) if tail else None


def _next_token(text: str, tokens: Tokens, position: int) -> tuple[int | None, int]:
    """The token of the first character from position on that is no blank, and that character's place."""
    while position < len(text) and text[position].isspace():
        position += 1
    token = int(np.searchsorted(tokens.ends, position, side="right"))
    return (token if token < len(tokens.ids) else None), position


@lru_cache(maxsize=8)
def _openings(tokenizer: Any, source: str) -> tuple[str, frozenset[int]]:
    """How a template (source) begins turns: the generation prompt where it is written without being asked for, else an
    empty text; and the added tokens of the generation prompt, and the one before a user's text."""
    template = ChatTemplate(tokenizer, None, datetime.date(2000, 1, 1), source=source)
    mark = "\ue000"
    question = [{"role": "user", "content": mark}]
    try:
        asked, prompted = template.render(question), template.render(question, True)
    except ValueError:
        return "", frozenset()
    added = added_ids(tokenizer)

    def of(text: str) -> list[int]:
        return [i for i in tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if i in added]

    header, _, behind = asked.partition(mark)
    prompt = always = ""
    if prompted != asked:
        prompt = prompted.removeprefix(asked) if prompted.startswith(asked) else ""
    else:
        with contextlib.suppress(ValueError):  # a template may refuse a conversation without messages
            prompt = always = os.path.commonprefix([template.render([])[::-1], behind[::-1]])[::-1]
    return always, frozenset(of(prompt)) | frozenset(of(header)[-1:])
