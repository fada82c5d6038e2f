"""The forms that a record may have, and how each becomes one that supervision.encode reads.

messages:  {"messages": [{"role": ..., "content": ...}, ...]}
prompt:    {"prompt": ..., "completion": ...}
sharegpt:  {"conversations": [{"from": ..., "value": ...}, ...]}, also with role and content; system, tools
alpaca:    {"instruction": ..., "input": ..., "output": ...}; system, history
tokens:    {"input_ids": [...], "labels": [...]}; attention_mask
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, Protocol

from qtarget_megatron.data.messages import ROLES, check_messages, content_text, expect, shown, wrapped
from qtarget_megatron.statistics import IGNORE_INDEX

AUTO = "auto"
# Form -> the fields that it is known by.
FORMS = {
    "messages": ("messages",),
    "prompt": ("prompt", "completion"),
    "sharegpt": ("conversations",),
    "alpaca": ("instruction", "output"),
    "tokens": ("input_ids", "labels"),
}
# Forms of questions without answers, which nothing can be trained on -> (the field they are known by, the form, the
# field of the answer).
UNANSWERED = {
    "prompt alone": ("prompt", "prompt", "completion"),
    "instruction alone": ("instruction", "alpaca", "output"),
}
_KNOWN_BY = frozenset(field for fields in FORMS.values() for field in fields)
# Whatever a record may hold for its form.
FIELDS = _KNOWN_BY | {"tools", "system", "input", "history", "attention_mask"}
_SPEAKERS = {role: role for role in ROLES} | {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "model", "bot", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}


def add_data_format(parser: argparse._ActionsContainer) -> None:
    """Add the flag --data-format to a parser, or to a group of one."""
    parser.add_argument(
        "--data-format",
        choices=(AUTO, *FORMS),
        default=AUTO,
        help='form of the records: messages, {"messages": [{"role", "content"}, ...]}; prompt, {"prompt", "completion"}'
        '; sharegpt, {"conversations": [{"from", "value"}, ...]}; alpaca, {"instruction", "input", "output"}; tokens, '
        '{"input_ids", "labels"}, where labels[i] is input_ids[i], not the id behind it, where it is trained on, and '
        "-100 elsewhere (default: auto, that of the first record, known by its fields; all others must have it too)",
    )


def form_of(record: Any) -> str:
    """The form of a record, known by its fields, of which null ones do not count.

    ValueError for a record of no form, and for one with the fields of several.
    """
    expect(dict, record, "record")
    found = _forms(record)
    if not found:
        wanted = ", or ".join(map(_quoted, FORMS.values()))
        raise ValueError(f"record: expected {wanted}, got {_fields(record)}")
    if len(found) > 1:
        raise ValueError(
            f"record: expected the fields of one form, got those of {' and '.join(found)}: say which is meant, with "
            f"--data-format {found[0]} for example"
        )
    return found[0]


def canonical(record: Any, form: str = AUTO) -> dict[str, Any]:
    """A record as supervision.encode reads it: messages; prompt and completion; or input_ids and labels.

    form: one of FORMS; auto: the one that form_of finds; one of UNANSWERED: with an empty answer. Fields that are of no
    form are kept, as they may be side inputs. ValueError for a record of another form, and for one that its form does
    not allow.
    """
    form = form_of(record) if form == AUTO else form
    if form in UNANSWERED:
        question, form, answer = UNANSWERED[form]
        expect(dict, record, "record")
        expect(str, record.get(question), f'"{question}"')
        record = {**record, answer: ""}
    if form not in FORMS:
        raise ValueError(f"form of the data: expected {', '.join((AUTO, *FORMS))}, got {form!r}")
    expect(dict, record, "record")
    if form not in (found := _forms(record)):
        if not found:
            raise ValueError(f"record of the form {form}: expected {_quoted(FORMS[form])}, got {_fields(record)}")
        raise ValueError(
            f"record: expected the form {form}, as the first record or --data-format has it, got the form {found[0]}: "
            f"split the file by form (jq -c 'select(.{FORMS[form][0]})' FILE > {form}.jsonl), or convert it to one"
        )
    rest = {name: value for name, value in record.items() if name not in _KNOWN_BY}
    return _READERS[form](record, rest)


class _Raw(Protocol):
    """What a record is read from."""

    form: str

    def raw(self, index: int) -> dict[str, Any]:
        """The record with its fields as they were written."""

    def where(self, index: int) -> str:
        """Where the record stands, for messages."""


def record_at(records: _Raw, index: int, *, file: str) -> dict[str, Any]:
    """canonical() of a source's record. ValueError says where it stands; file: that commands in the text name."""
    raw = records.raw(index)
    try:
        return canonical(raw, records.form)
    except ValueError as error:
        raise ValueError(f"{records.where(index)}: {error}".replace("FILE >", f"{file} >")) from error


def _forms(record: dict[str, Any]) -> list[str]:
    return [form for form, fields in FORMS.items() if all(record.get(field) is not None for field in fields)]


def _fields(record: dict[str, Any]) -> str:
    return ", ".join([f'"{name}"' for name, value in record.items() if value is not None][:8]) or "no fields"


def _quoted(fields: tuple[str, ...]) -> str:
    return " and ".join(f'"{field}"' for field in fields)


# ---- the forms, each: the record and its fields that are of no form -> the canonical record


def _messages(record: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    check_messages(record["messages"])
    return {**rest, **_tools(rest), "messages": record["messages"]}


def _prompt(record: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    for name in FORMS["prompt"]:
        expect(str, record[name], f'"{name}"')
    return {**rest, "prompt": record["prompt"], "completion": record["completion"]}


def _sharegpt(record: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    turns = record["conversations"]
    expect(list, turns, '"conversations"')
    if not turns:
        raise ValueError('"conversations": expected at least one message, got none')
    messages = [_turn(turn, f"message {i}") for i, turn in enumerate(turns)]
    rest = {**rest, **_tools(rest)}
    if rest.get("tools"):
        rest["tools"] = [
            tool if "function" in tool else {"type": "function", "function": tool} for tool in rest["tools"]
        ]
    return _conversation(rest, messages)


def _turn(turn: Any, where: str) -> dict[str, Any]:
    """A message of ShareGPT's, with all that it says besides."""
    expect(dict, turn, where)
    speaker, value = (_either(turn, names, where) for names in (("from", "role"), ("value", "content")))
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        came = json.dumps(speaker)[:40] if isinstance(speaker, str) else shown(speaker)
        raise ValueError(f'{where}, "from": expected one of {", ".join(_SPEAKERS)}; got {came}')
    message = {name: entry for name, entry in turn.items() if name not in ("from", "value", "role", "content")}
    message |= {"role": _SPEAKERS[speaker], "content": value}
    if speaker == "function_call":
        message |= {"content": None, "tool_calls": _calls(value, where)}
    elif value is None and not message.get("tool_calls"):
        raise ValueError(f'{where}: expected "from" and "value", got no "value"')
    return message


def _either(turn: dict[str, Any], names: tuple[str, str], where: str) -> Any:
    """The field that goes by one of two names; null where it has none."""
    values = [turn[name] for name in names if turn.get(name) is not None]
    if len(values) > 1:
        raise ValueError(f'{where}: expected one of "{names[0]}" and "{names[1]}", got both')
    return values[0] if values else None


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """The tool calls that a function_call holds, as JSON text or as it is: one call, or a list of them."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(
                f'{where}: expected of a function_call JSON of a call, {{"name": ..., "arguments": {{...}}}}, or of a '
                f"list of them, got {json.dumps(value)[:60]}"
            ) from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise ValueError(f"{where}: expected at least one call of a function_call, got none")
    for call in calls:
        expect(dict, call, f"{where}, function_call")
    return [wrapped(call) for call in calls]


def _alpaca(record: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    rest = dict(rest)
    given, history = (rest.pop(name, None) for name in ("input", "history"))
    texts = {name: record[name] for name in FORMS["alpaca"]} | {"input": "" if given is None else given}
    for name, text in texts.items():
        expect(str, text, f'"{name}"')
    history = [] if history is None else history
    expect(list, history, '"history"')
    question = "\n\n".join(texts[name] for name in ("instruction", "input") if texts[name].strip())
    messages = []
    for i, pair in enumerate([*history, [question, texts["output"]]]):
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise ValueError(f'"history": expected pairs [question, answer] of strings, got {shown(pair)} at entry {i}')
        messages += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    return _conversation(rest, messages)


def _conversation(rest: dict[str, Any], messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The record of these messages, with its "system" text, if any, as the first of them."""
    rest = dict(rest)
    system = rest.pop("system", None)
    system = "" if system is None else system
    expect(str, system, '"system"')
    check_messages(messages)
    if system.strip():
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        elif content_text(messages[0]) != system:
            raise ValueError('expected one system text, got "system" and another one as the first message: keep one')
    return {**rest, "messages": messages}


def _tools(rest: dict[str, Any]) -> dict[str, Any]:
    """The record's tools, which may be JSON text; an empty list is none."""
    tools = rest.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError):
            raise ValueError(f'"tools": expected a list, or JSON text of one, got {json.dumps(tools)[:60]}') from None
    if tools is None:
        return {"tools": None} if "tools" in rest else {}
    expect(list, tools, '"tools"')
    for i, tool in enumerate(tools):
        expect(dict, tool, f"tool {i}")
    return {"tools": tools or None}


def _tokens(record: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    rest = dict(rest)
    ids, labels, mask = record["input_ids"], record["labels"], rest.pop("attention_mask", None)
    for name, values in {"input_ids": ids, "labels": labels}.items():
        expect(list, values, f'"{name}"')
        for position, value in enumerate(values):
            if type(value) is not int:
                raise ValueError(f'"{name}": expected integers, got {shown(value)} at entry {position}')
    if not ids:
        raise ValueError('"input_ids": expected at least one token, got none')
    if len(labels) != len(ids):
        raise ValueError(f'"labels": expected as many as "input_ids", {len(ids)}, got {len(labels)}')
    if mask is not None and (not isinstance(mask, list) or mask != [1] * len(ids)):
        raise ValueError(
            f'"attention_mask": expected a 1 for each of the {len(ids)} "input_ids", got something else: leave padding '
            "out of the record"
        )
    wrong = next((i for i, token in enumerate(ids) if labels[i] not in (IGNORE_INDEX, token)), None)
    if wrong is not None:
        behind = all(label in (IGNORE_INDEX, token) for label, token in zip(labels, ids[1:], strict=False))
        advice = (
            "they are shifted by one, labels[i] being the token behind: they must be aligned, not shifted"
            if behind
            else "they must be aligned with the ids: labels[i] is input_ids[i] where it is trained on, -100 elsewhere"
        )
        raise ValueError(f'"labels": expected {ids[wrong]} or -100 at entry {wrong}, got {labels[wrong]}: {advice}')
    return {**rest, "input_ids": ids, "labels": labels}


_READERS: dict[str, Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]] = {
    "messages": _messages,
    "prompt": _prompt,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
    "tokens": _tokens,
}
