"""Records of a JSON lines file, by index; which forms a record may have."""

from __future__ import annotations

import json
import os
from array import array
from typing import Any

import numpy as np

ROLES = ("system", "user", "assistant", "tool")


def _expect(kind: type, value: Any, name: str) -> None:
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
        came = words.get(type(value)) or json.dumps(value, default=str)
        raise ValueError(f"{name}: expected {words[kind]}, got {came}")


def check_record(record: Any) -> None:
    """Raise ValueError unless the record has one of the two forms."""
    _expect(dict, record, "record")
    if "messages" not in record:
        for key in ("prompt", "completion"):
            if key not in record:
                found = ", ".join(f'"{k}"' for k in list(record)[:8]) or "no keys"
                wanted = '"messages", or "prompt" and "completion"'
                raise ValueError(f"record: expected {wanted}, got {found}")
            _expect(str, record[key], f'"{key}"')
        return
    if "prompt" in record or "completion" in record:
        raise ValueError('record: expected "messages" or "prompt" and "completion", got both')
    messages, tools = record["messages"], record.get("tools")
    _expect(list, messages, '"messages"')
    if not messages:
        raise ValueError('"messages": expected at least one message, got none')
    for i, message in enumerate(messages):
        _expect(dict, message, f"message {i}")
        for key in ("role", "content"):
            if key not in message:
                raise ValueError(f'message {i}: expected "role" and "content", got no "{key}"')
            _expect(str, message[key], f'message {i}, "{key}"')
        if message["role"] not in ROLES:
            roles = ", ".join(ROLES)
            raise ValueError(f"message {i}: expected role {roles}; got {message['role']!r}")
    if tools is not None:
        _expect(list, tools, '"tools"')
        for i, tool in enumerate(tools):
            _expect(dict, tool, f"tool {i}")


class JsonlFile:
    """Random access to the records of a JSON lines file (UTF-8); blank lines are ignored.

    Keeps 24 bytes per record (start, length, line number) and never the text; forked and spawned
    worker processes may read it. Records count from 0, the lines in error messages from 1.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = str(path)
        self._handle = None
        index = array("q")
        self._size = 0
        try:
            with open(self.path, "rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.isspace():
                        index.extend((self._size, len(line), number))
                    self._size += len(line)
        except OSError as error:
            raise ValueError(f"data file {self.path!r}: {error.strerror}") from error
        self._index = np.array(index, dtype=np.int64).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self._index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_handle": None}

    def where(self, index: int) -> str:
        """``path:line`` of a record, for messages."""
        return f"{self.path}:{self._index[index, 2]}"

    def record(self, index: int) -> dict[str, Any]:
        """The record at ``index``, of one of the two forms; otherwise ValueError with its line."""
        text = self.text(index)
        try:
            record = json.loads(text)
            check_record(record)
        except json.JSONDecodeError as error:
            came = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{self.where(index)}: expected JSON, got {came}") from error
        except ValueError as error:
            raise ValueError(f"{self.where(index)}: {error}") from error
        return record

    def text(self, index: int) -> str:
        """The line of a record as it stands in the file; ValueError where it is not UTF-8."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in {self.path}")
        if self._handle is None:
            handle = open(self.path, "rb", buffering=0)
            if (size := os.fstat(handle.fileno()).st_size) != self._size:
                handle.close()
                raise ValueError(f"data file {self.path!r} changed: it had {self._size} bytes, now {size}")
            self._handle = handle
        start, length, _ = self._index[index].tolist()
        # pread, not seek and read: forked workers share one file position.
        raw = os.pread(self._handle.fileno(), length, start)
        try:
            return raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.where(index)}: expected UTF-8, got {error.reason}") from error
