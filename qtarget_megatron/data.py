"""Instruction data from JSON lines: which tokens are trained on, nothing of how ranks share them.

One record per line: ``{"messages": [{"role": ..., "content": ...}, ...]}``, rendered by the
tokenizer's chat template, with the assistant messages as targets; or ``{"prompt": ...,
"completion": ...}`` with the completion as target. Fields that an objective asks for are its side
inputs (qtarget_megatron.side_inputs), other fields are ignored. Everything here depends on the
record, the tokenizer and the seed only, so every parallel layout sees the same samples.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch

from qtarget_megatron.side_inputs import read_side_inputs

IGNORE_INDEX = -100
ROLES = ("system", "user", "assistant", "tool")

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def load_tokenizer(directory: str | os.PathLike) -> Any:
    """The fast tokenizer in a local directory; no network, no code from the directory.

    Raises ValueError when the directory has no tokenizer, only an empty one, or one without the
    character offsets that supervision needs (a "slow" tokenizer).
    """
    path = str(directory)
    if not Path(path).is_dir():
        raise ValueError(f"tokenizer: expected a directory, got {path!r}")
    # Imported late, here and below: seconds, which processes that read no text do not spend.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise ValueError(f"no tokenizer can be loaded from {path!r}: {_one_line(error)}") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"expected a fast tokenizer (tokenizer.json) in {path!r}, got {kind}")
    # A model directory without tokenizer files loads too: transformers invents special tokens.
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    if not ordinary - set(tokenizer.all_special_tokens):
        raise ValueError(f"no tokenizer in {path!r}: expected tokenizer.json, got no vocabulary")
    return tokenizer


def compare_tokenizers(student: Any, teacher: Any, *, limit: int = 3) -> None:
    """Raise ValueError naming the first ``limit`` ids that stand for different tokens.

    Only ids count: the teacher reads the ids that the student's tokenizer wrote. Embedding matrices
    padded to different sizes are no difference, because padding rows have no token.
    """
    here = {index: repr(token) for token, index in student.get_vocab().items()}
    there = {index: repr(token) for token, index in teacher.get_vocab().items()}
    differing = sorted(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    if differing:
        shown = "; ".join(
            f"id {i}: {here.get(i, 'no token')} here, {there.get(i, 'no token')} there" for i in differing[:limit]
        )
        raise ValueError(
            f"student and teacher vocabularies differ in {len(differing)} ids ({shown}); "
            "use a teacher that shares the student's vocabulary"
        )


@lru_cache(maxsize=8)
def _special_ids(tokenizer: Any) -> frozenset[int]:
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _expect(kind: type, value: Any, name: str) -> None:
    if not isinstance(value, kind):
        words = {dict: "an object", list: "a list", str: "a string", type(None): "null"}
        came = words.get(type(value)) or json.dumps(value, default=str)
        raise ValueError(f"{name}: expected {words[kind]}, got {came}")


def _check_record(record: Any) -> None:
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
            _check_record(record)
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
    _check_record(record)
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
            known = _special_ids(tokenizer)
            special = np.array([i in known for i in ids[:limit]], dtype=bool)
            spans = [
                (begin, _turn_end(text, end, starts, ends, special))
                for begin, end in _locate_contents(render, messages, text)
            ]
    except (jinja2.TemplateError, TypeError) as error:
        reason = _one_line(error)
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


class SampleStatus(IntEnum):
    """How a record fits seq_length; SKIPPED: no target is left, and no training on it."""

    OK = 0
    TRUNCATED = 1
    SKIPPED = 2


def encode_at(
    file: JsonlFile, tokenizer: Any, seq_length: int, index: int, token_inputs: Sequence[str] = ()
) -> EncodedSample:
    """encode() of a file's record; ValueError names its line."""
    record = file.record(index)
    try:
        return encode(tokenizer, record, seq_length, token_inputs)
    except ValueError as error:
        raise ValueError(f"{file.where(index)}: {error}") from error


def inspect_samples(
    file: JsonlFile,
    tokenizer: Any,
    seq_length: int,
    indices: Iterable[int],
    token_inputs: Sequence[str] = (),
    check: Callable[[int, EncodedSample], None] | None = None,
) -> np.ndarray:
    """SampleStatus of the records at ``indices``, uint8; ValueError names the first bad line, or is check's."""
    statuses = []
    for index in indices:
        sample = encode_at(file, tokenizer, seq_length, index, token_inputs)
        if check is not None:
            check(int(index), sample)
        status = SampleStatus.TRUNCATED if sample.truncated else SampleStatus.OK
        statuses.append(status if sample.supervised.any() else SampleStatus.SKIPPED)
    return np.array(statuses, dtype=np.uint8)


class SupervisedDataset(torch.utils.data.Dataset):
    """``num_samples`` training samples, epoch by epoch, of the records that ``status`` keeps.

    Item i belongs to epoch i // n_kept. Every epoch holds each kept record once, in an order that
    (seed, epoch) alone decide, or in the file's order without ``shuffle``. An item is a dict of
    int64 tensors: ``tokens`` [S]; ``labels`` [S], where ``labels[t]`` is the token behind
    ``tokens[t]`` and -100 where that is no target or padding; ``position_ids`` [S] = 0..S-1;
    ``sample`` [], the record's index in the file. Besides, one float64 tensor [S] for each of
    ``token_inputs``, aligned with ``labels`` and 0 where those are -100. Records are encoded when
    they are asked for.

    Raises ValueError when no record is kept or ``status`` does not fit the file.
    """

    def __init__(
        self,
        file: JsonlFile,
        tokenizer: Any,
        seq_length: int,
        *,
        status: np.ndarray,
        num_samples: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        token_inputs: Sequence[str] = (),
    ):
        if len(file) == 0:
            raise ValueError(f"data file {file.path!r} holds no records")
        if (shape := np.shape(status)) != (len(file),):
            raise ValueError(f"status: expected shape ({len(file)},) as the file, got {shape}")
        if min(seed, num_samples) < 0:
            raise ValueError(f"seed, num_samples: expected 0 or more, got {seed}, {num_samples}")
        self._kept = np.flatnonzero(np.asarray(status) != SampleStatus.SKIPPED)
        if len(self._kept) == 0:
            raise ValueError(
                f"all {len(file)} samples of {file.path!r} are skipped, without a target in "
                f"seq_length {seq_length}: raise it, or add assistant messages or completions"
            )
        self._file, self._tokenizer = file, tokenizer
        self._seq_length, self._num_samples = seq_length, num_samples
        self._seed, self._shuffle, self._pad_id = seed, shuffle, pad_id
        self._token_inputs = tuple(token_inputs)
        self._epoch, self._order = -1, self._kept

    def __len__(self) -> int:
        return self._num_samples

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        if not 0 <= item < self._num_samples:
            raise IndexError(f"item {item} of {self._num_samples}")
        epoch, position = divmod(int(item), len(self._kept))
        if self._shuffle and epoch != self._epoch:
            generator = np.random.Generator(np.random.PCG64([self._seed, epoch]))
            self._epoch, self._order = epoch, generator.permutation(self._kept)
        index = int(self._order[position])
        sample = encode_at(self._file, self._tokenizer, self._seq_length, index, self._token_inputs)
        return {**training_item(sample, self._seq_length, self._pad_id), "sample": torch.tensor(index)}


def training_item(sample: EncodedSample, length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """What a model reads of a sample of at most ``length + 1`` tokens, all tensors [length].

    ``tokens``, ``labels`` and ``position_ids`` (int64) and the side inputs (float64), as
    SupervisedDataset describes them; padded with ``pad_id``, -100 and 0.
    """
    ids, behind = sample.input_ids, max(len(sample.input_ids) - 1, 0)
    tokens = np.full(length, pad_id, dtype=np.int64)
    labels = np.full(length, IGNORE_INDEX, dtype=np.int64)
    tokens[: len(ids)] = ids[:length]
    labels[:behind] = np.where(sample.supervised[1:], ids[1:], IGNORE_INDEX)
    item = {
        "tokens": torch.from_numpy(tokens),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.arange(length),
    }
    for name, values in sample.inputs.items():
        item[name] = torch.zeros(length, dtype=torch.float64)
        item[name][:behind] = torch.from_numpy(values[1:])
    return item
