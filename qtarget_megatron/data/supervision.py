"""Token ids of a record, and which of them are trained on."""

from __future__ import annotations

import datetime
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qtarget_megatron.data.answers import Answer, Tokens, locate, turn_end
from qtarget_megatron.data.forms import canonical
from qtarget_megatron.data.messages import for_template, has_weights, is_trained, message_weight, shown
from qtarget_megatron.data.records import Records
from qtarget_megatron.data.side_inputs import IS_PROMPT, WEIGHT, read_side_inputs
from qtarget_megatron.data.template import ChatTemplate, Unrenderable
from qtarget_megatron.data.tokenizer import all_ids
from qtarget_megatron.statistics import IGNORE_INDEX


@dataclass(frozen=True)
class EncodedSample:
    """``input_ids`` int64 [n] and ``supervised`` bool [n] (True: a target), n <= seq_length + 1.

    ``supervised[0]`` is always False: nothing precedes the first token to predict it from.
    ``inputs``: float64 [n] for each side input, 0 where not supervised.
    ``answers``: how many answers are targets; ``unended``: of these, those without an end of turn that is a target. Of
    a record of token ids nothing is known of either: 0.
    ``dated``: a chat template was used that asks for the date.
    ``leaves_tools``: the record has tools, at which its chat template does not look.
    ``weighted``: an answer has a weight, neither 0 nor 1, that no side input takes.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    truncated: bool
    inputs: dict[str, np.ndarray] = field(default_factory=dict)
    answers: int = 0
    unended: int = 0
    dated: bool = False
    leaves_tools: bool = False
    weighted: bool = False


@dataclass
class _Tokens:
    """All of a record's ids, and which are targets (bool [n]), before both are cut; the rest as EncodedSample has it.

    weights: float64 [n], what each token's answer counts; None where no answer says it.
    """

    ids: list[int]
    supervised: np.ndarray
    answers: int = 0
    unended: int = 0
    dated: bool = False
    leaves_tools: bool = False
    weights: np.ndarray | None = None
    weighted: bool = False


def encode(
    tokenizer: Any,
    record: dict[str, Any],
    seq_length: int,
    token_inputs: Sequence[str] = (),
    date: datetime.date | None = None,
) -> EncodedSample:
    """Token ids of one record, cut to ``seq_length + 1``, and which of them are targets.

    The record may have any form (data.forms); ShareGPT's and Alpaca's are read as messages.

    messages: rendered and tokenised once. Targets are the tokens whose characters lie inside an
    assistant message: from where the generation prompt ends (so a thinking block that the template
    writes is included) to the end of the turn, whatever blanks the template writes before it. A
    template with ``{% generation %}`` blocks decides itself. Assistant messages that are empty, or
    have ``"weight": 0``, ``"loss": false`` or ``"train": false``, are no targets; any other weight of
    theirs goes to the side input of that name, or makes the sample ``weighted``. The record's ``tools``
    go to the template, and ``tool_calls`` in the form that it asks for (messages.for_template).

    prompt, completion: tokenised separately, so that the prompt's ids are those of inference, with
    the tokenizer's special tokens except a closing end-of-sequence token. The completion is closed
    by one, if the tokenizer has it, and both are targets. A blank completion is no target.

    input_ids, labels: as they are; targets are the tokens whose label is not -100.

    token_inputs: the record's fields to read as side inputs (read_side_inputs says what they may
    hold). A record without targets needs none. "is_prompt" is no field: it makes targets of all tokens up to the last
    answer's end, of a record that has an answer, and is 1 for those that are of none. date: of templates that write it;
    None: today.

    Raises ValueError for malformed records and side inputs, for conversations that the template
    cannot render, for templates in which the assistant messages cannot be located, and for answers
    of which the template leaves out a part.
    """
    if seq_length < 1:
        raise ValueError(f"seq_length: expected at least 1, got {seq_length}")
    record = canonical(record)
    if "messages" in record:
        template = ChatTemplate(tokenizer, record.get("tools"), date or datetime.date.today())
        read = _read_messages(tokenizer, template, record["messages"], seq_length + 1, weigh=WEIGHT in token_inputs)
    elif "prompt" in record:
        read = _read_completion(tokenizer, record)
    else:
        read = _read_tokens(tokenizer, record)
    supervised = read.supervised[: seq_length + 1]
    supervised[:1] = False
    input_ids = np.array(read.ids[: seq_length + 1], dtype=np.int64)
    truncated = len(read.ids) > seq_length + 1
    weights = None if read.weights is None else read.weights[: seq_length + 1]
    fields = [name for name in token_inputs if name != IS_PROMPT]
    inputs = read_side_inputs(record, fields, supervised, truncated=truncated, answer_weights=weights)
    if IS_PROMPT in token_inputs:
        supervised, inputs[IS_PROMPT] = _with_prompt(supervised)
    return EncodedSample(
        input_ids,
        supervised,
        truncated,
        inputs,
        answers=read.answers,
        unended=read.unended,
        dated=read.dated,
        leaves_tools=read.leaves_tools,
        weighted=read.weighted,
    )


def _with_prompt(answers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens are targets where prompts are, and float64, 1 for a target of no answer. answers: bool [n]."""
    supervised = np.zeros_like(answers)
    if answers.any():
        supervised[1 : np.flatnonzero(answers)[-1] + 1] = True
    return supervised, (supervised & ~answers).astype(np.float64)


def tokenise(tokenizer: Any, text: str, **options: Any) -> Any:
    """What the tokenizer makes of a text. ValueError for one that is no Unicode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        came = json.dumps(text[error.start])
        raise ValueError(f"expected Unicode text, got {came}, half of a surrogate pair: mend or drop it") from None
    return tokenizer(text, verbose=False, **options)


def _read_tokens(tokenizer: Any, record: dict[str, Any]) -> _Tokens:
    ids, known = record["input_ids"], all_ids(tokenizer)
    if (strange := next((i for i, token in enumerate(ids) if token not in known), None)) is not None:
        raise ValueError(
            f'"input_ids": expected ids of this model\'s tokenizer, got {shown(ids[strange])} at entry {strange}, for '
            "which it has no token: tokenise the text with this tokenizer"
        )
    return _Tokens(ids, np.array(record["labels"]) != IGNORE_INDEX)


def prompt_of_text(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a prompt that no template renders: with the tokenizer's special tokens but one that closes it."""
    encoded = tokenise(tokenizer, text, return_special_tokens_mask=True)
    ids: list[int] = encoded["input_ids"]
    closed = ids and encoded["special_tokens_mask"][-1] and ids[-1] == tokenizer.eos_token_id
    return ids[:-1] if closed else ids


def _read_completion(tokenizer: Any, record: dict[str, Any]) -> _Tokens:
    text, eos = record["completion"], tokenizer.eos_token_id
    prompt = prompt_of_text(tokenizer, record["prompt"])
    completion = tokenise(tokenizer, text, add_special_tokens=False)["input_ids"]
    if eos is not None and completion[-1:] != [eos]:
        completion = [*completion, eos]
    supervised = np.zeros(len(prompt) + len(completion), dtype=bool)
    supervised[len(prompt) :] = bool(text.strip())
    answers = int(supervised.any())
    return _Tokens(prompt + completion, supervised, answers, unended=answers if eos is None else 0)


def _read_messages(
    tokenizer: Any, template: ChatTemplate, messages: list[dict[str, Any]], limit: int, *, weigh: bool
) -> _Tokens:
    """A conversation; targets are sought among the first ``limit`` ids only. weigh: the answers' weights are asked for,
    so that answers of different weights must be told apart."""
    targets = [i for i, message in enumerate(messages) if is_trained(message)]
    of_targets = [message_weight(messages[i]) for i in targets]
    apart = weigh and len(set(of_targets)) > 1
    text, answers = _located(template, messages, targets, apart)
    encoding = tokenise(tokenizer, text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoding["input_ids"]
    places = itertools.chain.from_iterable(encoding["offset_mapping"])
    offsets = np.fromiter(places, np.int64, 2 * len(ids)).reshape(-1, 2)[:limit]
    tokens = Tokens(np.array(ids[:limit], dtype=np.int64), offsets[:, 0], offsets[:, 1])
    starts, ends = tokens.starts, tokens.ends
    # Tokenizers that trim offsets give a lone space no width: let it reach back to its neighbour.
    starts = np.where(starts == ends, np.concatenate(([0], ends))[:-1], starts)
    supervised, weights, unended = np.zeros(len(ids), dtype=bool), np.ones(len(ids)), 0
    for answer, weight in zip(answers, of_targets if apart else len(answers) * (of_targets[:1] or [1.0]), strict=True):
        end = turn_end(tokenizer, template, text, tokens, answer)
        # Where an answer that is cut would have ended does not matter.
        unended += end is None and len(ids) <= limit
        inside = (starts >= answer.begin) & (ends <= (answer.end if end is None else end))
        supervised[:limit] |= inside
        weights[:limit][inside] = weight
    return _Tokens(
        ids,
        supervised,
        answers=len(answers),
        unended=unended,
        dated=template.dated,
        leaves_tools=template.leaves_tools,
        weights=weights if weigh and has_weights(messages) else None,
        weighted=not weigh and any(weight != 1 for weight in of_targets),
    )


def _located(
    template: ChatTemplate, messages: list[dict[str, Any]], targets: list[int], apart: bool
) -> tuple[str, list[Answer]]:
    """answers.locate() of the first form of the messages that the template writes whole."""
    problem: ValueError | None = None
    for form in for_template(messages, template.source):
        try:
            return locate(template, form, targets, apart=apart)
        except ValueError as error:
            # What is wrong with a form that the template writes says more than why it does not write another one.
            if problem is None or (isinstance(problem, Unrenderable) and not isinstance(error, Unrenderable)):
                problem = error
    assert problem is not None  # there is a form at least
    raise problem


def encode_at(
    file: Records,
    tokenizer: Any,
    seq_length: int,
    index: int,
    token_inputs: Sequence[str] = (),
    date: datetime.date | None = None,
) -> EncodedSample:
    """encode() of a file's record; ValueError names its line."""
    record = file.record(index)
    try:
        return encode(tokenizer, record, seq_length, token_inputs, date)
    except ValueError as error:
        raise ValueError(f"{file.where(index)}: {error}") from error
