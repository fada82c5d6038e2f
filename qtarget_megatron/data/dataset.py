"""Samples of a data source for training: their state, and the tensors of each."""

from __future__ import annotations

import datetime
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import torch

from qtarget_megatron.data.records import Records
from qtarget_megatron.data.side_inputs import batch_key
from qtarget_megatron.data.supervision import EncodedSample, encode_at
from qtarget_megatron.statistics import IGNORE_INDEX


@dataclass(frozen=True)
class SampleSizes:
    """What is known of each record of a source, [n] each.

    tokens:     int32, tokens within seq_length + 1.
    supervised: int32, how many of them are targets; 0: there is no training on it.
    truncated:  bool, whether the record has more.
    """

    tokens: np.ndarray
    supervised: np.ndarray
    truncated: np.ndarray

    @classmethod
    def empty(cls, count: int) -> SampleSizes:
        """Room for those of as many records."""
        return cls(np.empty(count, np.int32), np.empty(count, np.int32), np.empty(count, bool))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass
class SampleNotes:
    """What is to be said of samples, counted: answers that are targets; of these, without an end of turn among the
    targets; samples of a template that asks for the date; samples with tools at which the template does not look."""

    answers: int = 0
    unended: int = 0
    dated: int = 0
    leaves_tools: int = 0

    def add(self, sample: EncodedSample) -> None:
        """Count a sample."""
        self.answers += sample.answers
        self.unended += sample.unended
        self.dated += sample.dated
        self.leaves_tools += sample.leaves_tools

    def __add__(self, other: SampleNotes) -> SampleNotes:
        """The counts of both."""
        return SampleNotes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def lines(self, date: datetime.date | None) -> list[str]:
        """For the user, without those that there is nothing to say for. date: of templates that ask for it."""
        found = []
        if self.dated:
            found.append(
                f"the chat template writes the date of the day: {date} for all samples (--data-date sets another)"
            )
        if self.unended:
            found.append(
                f"WARNING: no end of turn is trained in {self.unended} of {self.answers} answers, as the chat template "
                "writes none behind them (or leaves it out of its {% generation %} blocks): the model may not learn to "
                "stop"
            )
        if self.leaves_tools:
            found.append(
                f"WARNING: the tools of {self.leaves_tools} samples are not in their text, as the chat template does "
                "not look at them: use a template that does, or write them into the system message"
            )
        return found


def measure_samples(
    records: Records,
    tokenizer: Any,
    seq_length: int,
    indices: Iterable[int],
    token_inputs: Sequence[str] = (),
    date: datetime.date | None = None,
    check: Callable[[int, EncodedSample], None] | None = None,
) -> SampleSizes:
    """The sizes of the records at ``indices``, in this order.

    ValueError names the first record that cannot be read, or is check's.
    """
    # A list would take ten times as much.
    tokens, supervised, truncated = array("i"), array("i"), bytearray()
    for index in indices:
        sample = encode_at(records, tokenizer, seq_length, index, token_inputs, date)
        if check is not None:
            check(int(index), sample)
        tokens.append(len(sample.input_ids))
        supervised.append(int(sample.supervised.sum()))
        truncated.append(sample.truncated)
    return SampleSizes(
        np.frombuffer(tokens, np.int32), np.frombuffer(supervised, np.int32), np.frombuffer(truncated, bool)
    )


class SupervisedSamples:
    """The samples of records as tensors, encoded when they are asked for.

    An item is a dict of tensors [length], int64 unless said otherwise: ``tokens``; ``labels``, where ``labels[t]`` is
    the token behind ``tokens[t]`` and -100 where that is no target or padding; ``position_ids`` = 0..length-1;
    ``padding``, bool, True where ``tokens[t]`` is none of the record's; ``sample`` [], the record's index, counted from
    ``first``. Besides, one float64 tensor for each of ``token_inputs``, under its batch_key(), aligned with ``labels``
    and 0 where those are -100. ``date``: of templates that write it; None: that of the day, which may change.
    ``held_out``: number of the held-out set that these are, which every token then has under this name.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: Any,
        seq_length: int,
        *,
        pad_id: int,
        token_inputs: Sequence[str] = (),
        date: datetime.date | None = None,
        first: int = 0,
        held_out: int | None = None,
    ):
        self._records, self._tokenizer, self._seq_length, self._pad_id = records, tokenizer, seq_length, pad_id
        self._token_inputs, self._date, self._first = tuple(token_inputs), date, first
        self._held_out = held_out

    def item(self, index: int, length: int) -> dict[str, torch.Tensor]:
        """The tensors of a record, padded to a length that holds it."""
        sample = encode_at(self._records, self._tokenizer, self._seq_length, index, self._token_inputs, self._date)
        return self._item(sample, length, self._first + index)

    def empty(self, length: int) -> dict[str, torch.Tensor]:
        """Padding alone; its ``sample`` is -1."""
        inputs = {name: np.empty(0) for name in self._token_inputs}
        nothing = EncodedSample(np.empty(0, np.int64), np.empty(0, bool), truncated=False, inputs=inputs)
        return self._item(nothing, length, -1)

    def _item(self, sample: EncodedSample, length: int, number: int) -> dict[str, torch.Tensor]:
        item = {**training_item(sample, length, self._pad_id), "sample": torch.tensor(number)}
        return item if self._held_out is None else item | {"held_out": torch.full((length,), self._held_out)}


def training_item(sample: EncodedSample, length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """What a model reads of a sample of at most ``length + 1`` tokens, all tensors [length].

    ``tokens``, ``labels`` and ``position_ids`` (int64), ``padding`` (bool) and the side inputs
    (float64), as SupervisedSamples describes them; padded with ``pad_id``, -100 and 0.
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
        "padding": torch.arange(length) >= len(ids),
    }
    for name, values in sample.inputs.items():
        aligned = item[batch_key(name)] = torch.zeros(length, dtype=torch.float64)
        aligned[:behind] = torch.from_numpy(values[1:])
    return item
