"""The messages of a record: what they may hold, which are trained on, and how they go to a chat template."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

# Says of an assistant message whether it is trained on, as OpenAI's, axolotl's and LLaMA-Factory's data have it.
_SWITCHES = ("weight", "loss", "train", "training", "train_on_turn")
_WORDS = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
# Other programs' fields that would train on parts of a message.
_PARTIAL = ("train_detail", "training_detail", "train_details")


def expect(kind: type, value: Any, name: str) -> None:
    """ValueError unless a value of JSON is of this type."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}: expected {_WORDS[kind]}, got {shown(value)}")


def shown(value: Any) -> str:
    """A value of JSON in an error message: a number as it is, of anything large what it is."""
    text = _WORDS.get(type(value)) or json.dumps(value, default=str)
    return text if len(text) <= 30 else f"{text[:27]}..."


def is_finite_number(value: Any) -> bool:
    """Whether a value of JSON is a number, true and false included, that a float64 can hold."""
    try:
        return isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer that no double holds
        return False


def check_messages(messages: Any) -> None:
    """ValueError unless this is a list of messages, each of a form that can be trained on."""
    expect(list, messages, '"messages"')
    if not messages:
        raise ValueError('"messages": expected at least one message, got none')
    for i, message in enumerate(messages):
        expect(dict, message, f"message {i}")
        for key in ("role", "content"):
            if key not in message and not (key == "content" and message.get("tool_calls")):
                raise ValueError(f'message {i}: expected "role" and "content", got no "{key}"')
        expect(str, message["role"], f'message {i}, "role"')
        if message["role"] not in ROLES:
            raise ValueError(f"message {i}: expected role {', '.join(ROLES)}; got {message['role']!r}")
        _check_content(message, f"message {i}")
        _check_tool_calls(message, f"message {i}")
        _check_switches(message, f"message {i}")


def _check_content(message: dict[str, Any], where: str) -> None:
    content = message.get("content")
    if content is None and message["role"] == "assistant" and message.get("tool_calls"):
        return
    if not isinstance(content, list):
        expect(str, content, f'{where}, "content"')
        return
    for part in content:
        if not (isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else part
            raise ValueError(
                f'{where}, "content": expected text, or parts {{"type": "text", "text": ...}}, got a part of type '
                f"{json.dumps(kind) if isinstance(kind, str) else shown(kind)}"
            )


def _check_tool_calls(message: dict[str, Any], where: str) -> None:
    if message["role"] == "assistant" and message.get("function_call") is not None:
        raise ValueError(f'{where}: "function_call" is the old form: write it as "tool_calls"')
    calls = message.get("tool_calls")
    if calls is None:
        return
    expect(list, calls, f'{where}, "tool_calls"')
    if calls and message["role"] != "assistant":
        raise ValueError(f'{where}: "tool_calls" belong to an assistant message, got role {message["role"]!r}')
    for number, call in enumerate(calls):
        name = f"{where}, tool call {number}"
        expect(dict, call, name)
        function = call.get("function", call)
        expect(dict, function, f'{name}, "function"')
        expect(str, function.get("name"), f'{name}, "name"')
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError):
                raise ValueError(f'{name}, "arguments": expected an object, or JSON text of one') from None
        if arguments is not None:
            expect(dict, arguments, f'{name}, "arguments"')


def _check_switches(message: dict[str, Any], where: str) -> None:
    for name in _PARTIAL:
        if message.get(name) is not None:
            raise ValueError(f'{where}: "{name}" (training on a part of a message) is not supported: remove it')
    values = {}
    for name in _SWITCHES:
        if (value := message.get(name)) is None:
            continue
        # True and 1.0 are 1 too.
        good = is_finite_number(value) and (value >= 0 if name == "weight" else value in (0, 1))
        if not good:
            expected = "a number, 0 or more: what its tokens count" if name == "weight" else "0 or 1, false or true"
            left_out = "(0: the answer is read, but not trained on)"
            raise ValueError(f'{where}, "{name}": expected {expected} {left_out}, got {shown(value)}')
        if value and message["role"] != "assistant":
            raise ValueError(
                f'{where}, "{name}": only assistant messages are trained on, got role {message["role"]!r}: remove it'
            )
        values[name] = bool(value)
    if len(set(values.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(values)} contradict each other: keep one of them")


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message is a target: an assistant's, not empty, and not left out by its weight, loss or train."""
    if message["role"] != "assistant" or any(message.get(name) is not None and not message[name] for name in _SWITCHES):
        return False
    return bool(content_text(message).strip() or message.get("tool_calls"))


def message_weight(message: dict[str, Any]) -> float:
    """What the tokens of a message count: its "weight", else 1."""
    weight = message.get("weight")
    return 1.0 if weight is None else float(weight)


def has_weights(messages: Sequence[dict[str, Any]]) -> bool:
    """Whether an assistant message says what its tokens count."""
    return any(message["role"] == "assistant" and message.get("weight") is not None for message in messages)


def content_text(message: dict[str, Any]) -> str:
    """A message's content as one text: the parts of a list follow each other without anything between them."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def for_template(messages: list[dict[str, Any]], source: str) -> Iterator[list[dict[str, Any]]]:
    """A conversation in the forms that a chat template (source: its text) may ask for, the likeliest first.

    Without fields that are null, as transformers passes them, and without those that say what is trained on. A
    developer becomes a system message where the template does not mention that role. Tool calls are as they came, else
    with "type" and "function"; their arguments are objects, as transformers documents, else JSON text; content that a
    message with tool calls lacks stays missing, else it is empty, else null.
    """
    plain = []
    for message in messages:
        kept = {key: value for key, value in message.items() if value is not None and key not in _SWITCHES}
        if "content" in kept:
            kept["content"] = content_text(message)
        if kept["role"] == "developer" and "developer" not in source:
            kept["role"] = "system"
        plain.append(kept)
    calling = [i for i, message in enumerate(plain) if message.get("tool_calls")]
    if not calling:
        yield plain
        return
    silent = any("content" not in plain[i] for i in calling)
    short = any(not {"type", "function"} <= call.keys() for i in calling for call in plain[i]["tool_calls"])
    for complete, as_text in itertools.product((False, True) if short else (False,), (False, True)):
        for content in ({}, {"content": ""}, {"content": None}) if silent else ({},):
            result = list(plain)
            for i in calling:
                calls = [_call(call, complete, as_text) for call in plain[i]["tool_calls"]]
                result[i] = {**content, **plain[i], "tool_calls": calls}
            yield result


def wrapped(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call with "type" and "function", as transformers documents it, of one that is its name and arguments."""
    if "function" in call:
        return {"type": "function", **call}
    function = {name: call[name] for name in ("name", "arguments") if name in call}
    return {"type": "function", **{name: call[name] for name in call if name not in function}, "function": function}


def _call(call: dict[str, Any], complete: bool, as_text: bool) -> dict[str, Any]:
    call = wrapped(call) if complete else call
    function = call.get("function", call)
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    elif not as_text and not isinstance(arguments, dict):
        arguments = json.loads(arguments or "{}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
