"""Rows of samples as tensors: a sample a row, or several, one behind another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qtarget_megatron.data.rows import Rows
from qtarget_megatron.statistics import IGNORE_INDEX

# What stands where no token is, in tensors that are not 0 there.
_FILLING = {"labels": IGNORE_INDEX, "padding": True, "sample": -1, "teacher_ids": -1, "teacher_log_p": -torch.inf}


class Samples(Protocol):
    """Samples that can be asked for one by one, as SupervisedSamples."""

    def item(self, index: int, length: int) -> dict[str, Tensor]:
        """The tensors of a sample, padded to a length that holds it."""

    def empty(self, length: int) -> dict[str, Tensor]:
        """The tensors of no sample."""


class KeptSamples:
    """The samples of several sources that are trained on, as one, numbered source behind source."""

    def __init__(self, sources: Sequence[tuple[Samples, np.ndarray]]):
        """sources: samples, and the indices [n] of those that are kept."""
        self._samples = [samples for samples, _ in sources]
        self._kept = [kept for _, kept in sources]
        self._ends = np.cumsum([len(kept) for kept in self._kept])

    def item(self, index: int, length: int) -> dict[str, Tensor]:
        """The tensors of a sample, padded to a length that holds it."""
        source = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[source - 1]) if source else 0)
        return self._samples[source].item(int(self._kept[source][place]), length)

    def empty(self, length: int) -> dict[str, Tensor]:
        """The tensors of no sample."""
        return self._samples[0].empty(length)


@dataclass(frozen=True)
class Packing:
    """How samples stand in a row.

    lengths:    [n] tokens of each sample.
    alignment:  a sample is filled up to a multiple of this.
    step:       a row is padded to a multiple of this, at most to the row's length; None: to the row's length.
    """

    lengths: np.ndarray
    alignment: int
    step: int | None = None

    @property
    def aligned(self) -> np.ndarray:
        """[n], the tokens that each sample takes of a row."""
        return aligned_lengths(self.lengths, self.alignment)


def aligned_lengths(lengths: np.ndarray, alignment: int) -> np.ndarray:
    """The next multiples, int32."""
    return (-(-lengths.astype(np.int32) // alignment) * alignment).astype(np.int32)


class RowDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """``num_rows`` rows of whole samples.

    An item is a dict of tensors. Without packing it is that of a sample, padded to ``row_length``. With packing each
    sample begins with ``position_ids`` 0, and so does what is left at the end, which is padding; ``sample`` is int64
    [row_length], the number of each token's sample and -1 where there is none.
    """

    def __init__(
        self,
        samples: Samples,
        rows: Rows,
        row_length: int,
        *,
        num_rows: int,
        pad_id: int,
        packing: Packing | None = None,
    ):
        """rows: of indices of samples. packing: None: a sample a row. ValueError for a row that is no multiple of the
        alignment."""
        if packing is not None and row_length % packing.alignment:
            raise ValueError(f"packed rows are multiples of {packing.alignment} tokens, got --seq-length {row_length}")
        self._samples, self._rows, self._row_length = samples, rows, row_length
        self._num_rows, self._pad_id, self._packing = num_rows, pad_id, packing
        self._aligned = None if packing is None else packing.aligned

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < self._num_rows:
            raise IndexError(f"row {item} of {self._num_rows}")
        places = self._rows[int(item)]
        if self._packing is None or self._aligned is None:
            return self._samples.item(int(places[0]), self._row_length) if len(places) else self._empty()
        if not len(places):
            empty = self._empty()
            return empty | {"sample": torch.full((self._row_length,), -1)}
        lengths = self._aligned[places].tolist()
        items = [self._samples.item(int(index), length) for index, length in zip(places, lengths, strict=True)]
        row_length, step = self._row_length, self._packing.step
        if step is not None:
            row_length = min(-(-sum(lengths) // step) * step, row_length)
        free = row_length - sum(lengths)
        return {key: self._joined(key, [item[key] for item in items], items, free) for key in items[0]}

    def _empty(self) -> dict[str, Tensor]:
        return self._samples.empty(self._row_length)

    def _joined(self, key: str, parts: list[Tensor], items: Sequence[Mapping[str, Tensor]], free: int) -> Tensor:
        if key == "sample":
            parts = [torch.where(item["padding"], -1, item["sample"]) for item in items]
        elif parts[0].dim() == 0:
            return torch.stack(parts).sum()  # a time
        filling = self._pad_id if key == "tokens" else _FILLING.get(key, 0)
        rest = torch.full((free, *parts[0].shape[1:]), filling, dtype=parts[0].dtype)
        if key == "position_ids":
            rest = torch.arange(free)
        return torch.cat([*parts, rest])
