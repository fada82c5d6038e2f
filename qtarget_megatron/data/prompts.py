"""What a model is asked by a record: its token ids up to the answer, as they are at inference."""

from __future__ import annotations

import contextlib
import datetime
import os
from typing import Any

import numpy as np

from qtarget_megatron.data.forms import AUTO, UNANSWERED, canonical
from qtarget_megatron.data.messages import for_template
from qtarget_megatron.data.records import Records, open_records
from qtarget_megatron.data.supervision import prompt_of_text, tokenise
from qtarget_megatron.data.template import ChatTemplate, Unrenderable
from qtarget_megatron.statistics import IGNORE_INDEX


def prompt_ids(tokenizer: Any, record: dict[str, Any], date: datetime.date | None = None) -> list[int]:
    """Token ids of what a record asks; the record may have any form (data.forms).

    messages:           up to the last answer, which is left out if it ends the conversation, with the template's
                        generation prompt behind.
    prompt, completion: the prompt, with the tokenizer's special tokens but a closing end-of-sequence token.
    input_ids, labels:  up to the first target.
    date:               of templates that write it; None: today.

    ValueError for malformed records, for a conversation that only an assistant speaks in, or that the template cannot
    render, and for ids without a target.
    """
    record = canonical(record)
    if "messages" in record:
        return _of_messages(tokenizer, record, date or datetime.date.today())
    if "prompt" in record:
        return prompt_of_text(tokenizer, record["prompt"])
    targets = np.flatnonzero(np.array(record["labels"]) != IGNORE_INDEX)
    if not len(targets):
        raise ValueError('"labels": expected a target at least, whose answer is asked for, got -100 throughout')
    return list(record["input_ids"][: targets[0]])


def _of_messages(tokenizer: Any, record: dict[str, Any], date: datetime.date) -> list[int]:
    messages = record["messages"]
    asked = messages[:-1] if messages[-1]["role"] == "assistant" else messages
    if not asked:
        raise ValueError('"messages": expected a question before the answer, got the answer alone')
    template = ChatTemplate(tokenizer, record.get("tools"), date)
    problem: Unrenderable | None = None
    for form in for_template(asked, template.source):
        try:
            text = template.render(form, generation_prompt=True)
        except Unrenderable as error:
            problem = problem or error
        else:
            return list(tokenise(tokenizer, text, add_special_tokens=False)["input_ids"])
    assert problem is not None  # there is a form at least
    raise problem


def open_prompts(path: str | os.PathLike[str], form: str = AUTO) -> Records:
    """The records of a source of questions: as of open_records, but prompts and instructions need no answer."""
    try:
        return open_records(path, form)
    except ValueError:
        for guess in UNANSWERED if form == AUTO else ():
            with contextlib.suppress(ValueError):
                return open_records(path, guess)
        raise


def prompt_at(records: Records, tokenizer: Any, index: int, date: datetime.date | None = None) -> list[int]:
    """prompt_ids() of a record of open_prompts(). ValueError names where it stands."""
    record = records.record(index)
    try:
        return prompt_ids(tokenizer, record, date)
    except ValueError as error:
        raise ValueError(f"{records.where(index)}: {error}") from error
