"""Samples of a file for training: their state, their order, and the tensors of each."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import torch

from qtarget_megatron.data.records import Records
from qtarget_megatron.data.side_inputs import batch_key
from qtarget_megatron.data.supervision import EncodedSample, encode_at
from qtarget_megatron.statistics import IGNORE_INDEX


class SampleStatus(IntEnum):
    """How a record fits seq_length; SKIPPED: no target is left, and no training on it."""

    OK = 0
    TRUNCATED = 1
    SKIPPED = 2


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


def inspect_samples(
    file: Records,
    tokenizer: Any,
    seq_length: int,
    indices: Iterable[int],
    token_inputs: Sequence[str] = (),
    check: Callable[[int, EncodedSample], None] | None = None,
    date: datetime.date | None = None,
) -> np.ndarray:
    """SampleStatus of the records at ``indices``, uint8; ValueError names the first bad line, or is check's."""
    statuses = []
    for index in indices:
        sample = encode_at(file, tokenizer, seq_length, index, token_inputs, date)
        if sample.weighted:
            raise ValueError(
                f'{file.where(index)}: an answer has a "weight" that is neither 0 nor 1, which this objective does not '
                'read: train with one that has the side input "weight", as iw-sft, or give weights 0 and 1'
            )
        if check is not None:
            check(int(index), sample)
        status = SampleStatus.TRUNCATED if sample.truncated else SampleStatus.OK
        statuses.append(status if sample.supervised.any() else SampleStatus.SKIPPED)
    return np.array(statuses, dtype=np.uint8)


class SupervisedDataset(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """``num_samples`` training samples, epoch by epoch, of the records that ``status`` keeps.

    Item i belongs to epoch i // n_kept. Every epoch holds each kept record once, in an order that
    (seed, epoch) alone decide, or in the file's order without ``shuffle``. An item is a dict of
    tensors, int64 unless said otherwise: ``tokens`` [S]; ``labels`` [S], where ``labels[t]`` is the
    token behind ``tokens[t]`` and -100 where that is no target or padding; ``position_ids`` [S] = 0..S-1;
    ``padding`` [S], bool, True where ``tokens[t]`` is none of the record's; ``sample`` [], the
    record's index in the file. Besides, one float64 tensor [S] for each of ``token_inputs``, under
    its batch_key(), aligned with ``labels`` and 0 where those are -100. Records are encoded when
    they are asked for. ``date``: of templates that write it; None: that of the day, which may change.

    Raises ValueError when no record is kept or ``status`` does not fit the file.
    """

    def __init__(
        self,
        file: Records,
        tokenizer: Any,
        seq_length: int,
        *,
        status: np.ndarray,
        num_samples: int,
        seed: int,
        pad_id: int,
        shuffle: bool = True,
        token_inputs: Sequence[str] = (),
        date: datetime.date | None = None,
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
        self._token_inputs, self._date = tuple(token_inputs), date
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
        return self.of_record(int(self._order[position]), self._seq_length)

    def of_record(self, index: int, length: int) -> dict[str, torch.Tensor]:
        """The item of a record, padded to a length that holds it."""
        sample = encode_at(self._file, self._tokenizer, self._seq_length, index, self._token_inputs, self._date)
        return {**training_item(sample, length, self._pad_id), "sample": torch.tensor(index)}


def training_item(sample: EncodedSample, length: int, pad_id: int) -> dict[str, torch.Tensor]:
    """What a model reads of a sample of at most ``length + 1`` tokens, all tensors [length].

    ``tokens``, ``labels`` and ``position_ids`` (int64), ``padding`` (bool) and the side inputs
    (float64), as SupervisedDataset describes them; padded with ``pad_id``, -100 and 0.
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
