"""The messages of a record: what they may hold, which are trained on, and how they go to a chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")

# Says of an assistant message whether it is trained on, as OpenAI's and axolotl's data have it.
_SWITCHES = ("weight", "train", "training", "train_on_turn")
# Other programs' fields that would train on parts of a message.
_PARTIAL = ("train_detail", "training_detail", "train_details")


def expect(kind: type, value: Any, name: str) -> None:
    """ValueError unless a value of JSON is of this type."""
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
        came = words.get(type(value)) or json.dumps(value, default=str)
        raise ValueError(f"{name}: expected {words[kind]}, got {came}")


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
                f"{json.dumps(kind)[:60]}"
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
        if not isinstance(value, int | float) or value not in (0, 1):
            hint = " (a weight of the whole record stands beside messages)" if name == "weight" else ""
            raise ValueError(
                f'{where}, "{name}": expected 0 or 1, false or true: whether the answer is trained on; got '
                f"{json.dumps(value)[:60]}{hint}"
            )
        if value and message["role"] != "assistant":
            raise ValueError(
                f'{where}, "{name}": only assistant messages are trained on, got role {message["role"]!r}: remove it'
            )
        values[name] = bool(value)
    if len(set(values.values())) > 1:
        raise ValueError(f"{where}: {' and '.join(values)} contradict each other: keep one of them")


def is_trained(message: dict[str, Any]) -> bool:
    """Whether a message is a target: an assistant's, not empty, and not left out by its weight or train."""
    if message["role"] != "assistant" or not all(message.get(name) in (None, 1) for name in _SWITCHES):
        return False
    return bool(content_text(message).strip() or message.get("tool_calls"))


def content_text(message: dict[str, Any]) -> str:
    """A message's content as one text: the parts of a list follow each other without anything between them."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def for_template(messages: list[dict[str, Any]], source: str) -> Iterator[list[dict[str, Any]]]:
    """A conversation in the forms that a chat template (source: its text) may ask for, the likeliest first.

    Without fields that are null, as transformers passes them, and without those that say what is trained on. A
    developer becomes a system message where the template does not mention that role. Arguments of tool calls are
    objects, as transformers documents, else JSON text; content that a message with tool calls lacks stays missing,
    else it is empty, else null.
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
    for as_text in (False, True):
        for content in ({}, {"content": ""}, {"content": None}) if silent else ({},):
            result = list(plain)
            for i in calling:
                calls = [_call(call, as_text) for call in plain[i]["tool_calls"]]
                result[i] = {**content, **plain[i], "tool_calls": calls}
            yield result


def _call(call: dict[str, Any], as_text: bool) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments")
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    elif not as_text and not isinstance(arguments, dict):
        arguments = json.loads(arguments or "{}")
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else function
