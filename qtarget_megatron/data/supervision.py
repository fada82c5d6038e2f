"""Which tokens of a record are trained on."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from qtarget_megatron.data.jsonl import JsonlFile, check_record
from qtarget_megatron.data.tokenizer import one_line, special_ids
from qtarget_megatron.side_inputs import read_side_inputs

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedSample:
    """``input_ids`` int64 [n] and ``supervised`` bool [n] (True: a target), n <= seq_length + 1.

    ``supervised[0]`` is always False: nothing precedes the first token to predict it from.
    ``inputs``: float64 [n] for each side input, 0 where not supervised.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool
    inputs: dict[str, np.ndarray] = field(default_factory=dict)


def encode(tokenizer: Any, record: dict[str, Any], seq_length: int, token_inputs: Sequence[str] = ()) -> EncodedSample:
    """Token ids of one record, cut to ``seq_length + 1``, and which of them are targets.

    messages: rendered and tokenised once. Targets are the tokens whose characters lie inside an
    assistant message: from where the generation prompt ends (so a thinking block that the template
    writes is included) to the special end-of-turn token behind the content. A template with
    ``{% generation %}`` blocks decides itself. Assistant messages without content are no targets.
    The record's ``tools`` go to the template.

    prompt, completion: tokenised separately, so that the prompt's ids are those of inference, with
    the tokenizer's special tokens except a closing end-of-sequence token. The completion is closed
    by one, if the tokenizer has it, and both are targets. A blank completion is no target.

    token_inputs: the record's fields to read as side inputs (read_side_inputs says what they may
    hold). A record without targets needs none.

    Raises ValueError for malformed records and side inputs, for conversations that the template
    cannot render and for templates in which the assistant messages cannot be located.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length: expected at least 1, got {seq_length}")
    check_record(record)
    if "messages" in record:
        ids, supervised = _encode_messages(tokenizer, record, seq_length + 1)
    else:
        ids, supervised = _encode_completion(tokenizer, record)
    supervised = supervised[: seq_length + 1]
    supervised[:1] = False
    input_ids = np.array(ids[: seq_length + 1], dtype=np.int64)
    truncated = len(ids) > seq_length + 1
    inputs = read_side_inputs(record, token_inputs, supervised, truncated=truncated)
    return EncodedSample(input_ids, supervised, truncated, inputs)


def _encode_completion(tokenizer: Any, record: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    text, eos = record["completion"], tokenizer.eos_token_id
    head = tokenizer(record["prompt"], return_special_tokens_mask=True, verbose=False)
    prompt, added = head["input_ids"], head["special_tokens_mask"]
    if prompt and added[-1] and prompt[-1] == eos:
        prompt = prompt[:-1]
    completion = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if eos is not None and completion[-1:] != [eos]:
        completion = [*completion, eos]
    supervised = np.zeros(len(prompt) + len(completion), dtype=bool)
    supervised[len(prompt) :] = bool(text.strip())
    return prompt + completion, supervised


def _encode_messages(tokenizer: Any, record: dict[str, Any], limit: int) -> tuple[list[int], np.ndarray]:
    """All ids of a conversation; targets are sought among the first ``limit`` only."""
    messages = [{k: v for k, v in m.items() if v is not None} for m in record["messages"]]
    tools = record.get("tools")
    try:
        template = tokenizer.get_chat_template(tools=tools)
    except ValueError as error:
        raise ValueError(
            "the tokenizer has no chat template: use prompt/completion records or a tokenizer with a template"
        ) from error

    def render(part: list[dict[str, Any]], generation_prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(part, tools=tools, tokenize=False, add_generation_prompt=generation_prompt)

    def tokenise(text: str) -> tuple[list[int], np.ndarray, np.ndarray]:
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64).reshape(-1, 2)[:limit]
        return encoding["input_ids"], offsets[:, 0], offsets[:, 1]

    try:
        if _GENERATION_BLOCK.search(template):
            from transformers.utils.chat_template_utils import render_jinja_template

            # The blocks' characters, not apply_chat_template's token mask: that one runs on to the
            # end of the conversation when a block ends in a character that no token covers.
            (text,), (spans,) = render_jinja_template(
                conversations=[messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **tokenizer.special_tokens_map,
            )
            ids, starts, ends = tokenise(text)
        else:
            text = render(messages)
            ids, starts, ends = tokenise(text)
            known = special_ids(tokenizer)
            special = np.array([i in known for i in ids[:limit]], dtype=bool)
            spans = [
                (begin, _turn_end(text, end, starts, ends, special))
                for begin, end in _locate_contents(render, messages, text)
            ]
    except (jinja2.TemplateError, TypeError) as error:
        reason = one_line(error)
        raise ValueError(f"the chat template cannot render this conversation: {reason}") from error
    # Tokenizers that trim offsets give a lone space no width: let it reach back to its neighbour.
    starts = np.where(starts == ends, np.concatenate(([0], ends))[:-1], starts)
    supervised = np.zeros(len(ids), dtype=bool)
    for begin, end in spans:
        supervised[:limit] |= (starts >= begin) & (ends <= end)
    return ids, supervised


def _locate_contents(render: Callable[..., str], messages: list[dict[str, Any]], text: str) -> list[tuple[int, int]]:
    """Spans of ``text`` that hold the assistant contents, thinking included.

    A content begins where the conversation before it, rendered with the generation prompt, ends. It
    ends where a mark set behind it appears in a second rendering: searching for the content would
    stop too early at an answer that its own thinking quotes.
    """
    filled = [i for i, m in enumerate(messages) if m["content"].strip()]
    targets = [i for i in filled if messages[i]["role"] == "assistant"]
    if any(m["role"] == "assistant" and m.get("tool_calls") for m in messages):
        raise ValueError("tool_calls need a chat template with {% generation %} blocks")
    if not targets:
        return []
    if targets[0] == 0:
        raise ValueError("message 0: expected a system or user message first, got an assistant's")
    ends = _content_ends(render, messages, text, filled)
    if ends is None:  # the template examines other roles' contents: mark the answers alone
        ends = _content_ends(render, messages, text, targets)
    if ends is None or any(i not in ends for i in targets):
        raise ValueError(
            "this chat template does not write every assistant message once and as it came: use a "
            "template with {% generation %} blocks or prompt/completion records"
        )
    spans = []
    headers: dict[str, str] = {}  # role -> the template's text between such a message and an answer
    for i in targets:
        role, before = messages[i - 1]["role"], ends.get(i - 1)
        if before is not None and role in headers and text.startswith(headers[role], before):
            start = before + len(headers[role])  # saves rendering all earlier turns once more
        else:
            prefix = render(messages[:i], True)
            if not text.startswith(prefix):
                raise ValueError(
                    f"message {i}: this chat template rewrites earlier turns (up to here the "
                    "conversation is not the beginning of the whole one): use one answer per "
                    "record, a template with {% generation %} blocks or prompt/completion records"
                )
            start = len(prefix)
            if before is not None and before <= start:
                headers[role] = text[before:start]
        spans.append((start, ends[i]))
    return spans


def _content_ends(
    render: Callable[..., str], messages: list[dict[str, Any]], text: str, which: list[int]
) -> dict[int, int] | None:
    """Message -> where its content ends in ``text``, with the blanks behind it, for ``which``.

    Without the messages that the template drops or repeats; None if it looks at the marks.
    """
    mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in text)
    marked, blanks = [dict(message) for message in messages], {}
    for i in which:
        content = messages[i]["content"]
        solid = content.rstrip()  # the mark goes before the blanks, which many templates strip
        blanks[i] = content[len(solid) :]
        marked[i]["content"] = f"{solid}{mark}{i}{mark}{blanks[i]}"
    pieces = re.split(f"{mark}([0-9]+){mark}", render(marked))
    if "".join(pieces[::2]) != text:
        return None
    found = [int(number) for number in pieces[1::2]]
    positions = np.cumsum([len(piece) for piece in pieces[:-1:2]]).tolist()
    return {
        i: end + (len(blanks[i]) if text.startswith(blanks[i], end) else 0)
        for i, end in zip(found, positions, strict=True)
        if found.count(i) == 1
    }


def _turn_end(text: str, end: int, starts: np.ndarray, ends: np.ndarray, special: np.ndarray) -> int:
    """A content's ``end``, moved behind the special token that follows after spaces at most."""
    position = end
    while text.startswith(" ", position):
        position += 1
    token = int(np.searchsorted(ends, position, side="right"))
    if token < len(ends) and special[token] and starts[token] <= position:
        return int(ends[token])
    return end


def encode_at(
    file: JsonlFile, tokenizer: Any, seq_length: int, index: int, token_inputs: Sequence[str] = ()
) -> EncodedSample:
    """encode() of a file's record; ValueError names its line."""
    record = file.record(index)
    try:
        return encode(tokenizer, record, seq_length, token_inputs)
    except ValueError as error:
        raise ValueError(f"{file.where(index)}: {error}") from error
