"""Rows that hold several samples, one behind another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from qtarget_megatron.data.rows import RowPlan
from qtarget_megatron.statistics import IGNORE_INDEX

# What stands where no token is, in tensors that are not 0 there.
_FILLING = {"labels": IGNORE_INDEX, "padding": True, "teacher_ids": -1, "teacher_log_p": -torch.inf}


class Samples(Protocol):
    """A data set whose records can be asked for one by one, as SupervisedDataset's."""

    def of_record(self, index: int, length: int) -> dict[str, Tensor]:
        """The item of a record, padded to a length."""


class PackedDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """``num_rows`` rows of whole samples, epoch by epoch.

    An item is a dict of tensors as a sample's is, of ``row_length`` tokens: each sample is filled up to a multiple of
    ``alignment`` and begins with ``position_ids`` 0, and so does what is left at the end, which is padding. ``sample``
    is int64 [row_length], the record of each token and -1 where there is none.
    """

    def __init__(
        self,
        samples: Samples,
        kept: np.ndarray,
        lengths: np.ndarray,
        row_length: int,
        *,
        num_rows: int,
        alignment: int,
        seed: int,
        shuffle: bool,
        pad_id: int,
    ):
        """kept: indices of the records that are trained on. lengths: tokens of each of them.

        ValueError for a row that is no multiple of the alignment.
        """
        if row_length % alignment:
            raise ValueError(f"packed rows are multiples of {alignment} tokens, got --seq-length {row_length}")
        self._samples, self._kept, self._row_length = samples, kept, row_length
        self._num_rows, self._pad_id = num_rows, pad_id
        self._aligned = -(-lengths.astype(np.int64) // alignment) * alignment
        self._tokens = int(lengths.sum(dtype=np.int64))
        self.plan = RowPlan(self._aligned, row_length, seed=seed, shuffled=shuffle)

    def __len__(self) -> int:
        return self._num_rows

    @property
    def fill(self) -> float:
        """Share of the tokens of the first epoch's rows that are a sample's."""
        return self._tokens / (len(self.plan.epoch(0)) * self._row_length)

    def __getitem__(self, item: int) -> dict[str, Tensor]:
        if not 0 <= item < self._num_rows:
            raise IndexError(f"row {item} of {self._num_rows}")
        places = self.plan[int(item)]
        items = [self._samples.of_record(int(self._kept[i]), int(self._aligned[i])) for i in places]
        free = self._row_length - int(self._aligned[places].sum())
        return {key: self._joined(key, [item[key] for item in items], items, free) for key in items[0]}

    def _joined(self, key: str, parts: list[Tensor], items: Sequence[Mapping[str, Tensor]], free: int) -> Tensor:
        if key == "sample":
            parts = [torch.where(item["padding"], -1, item["sample"]) for item in items]
        elif parts[0].dim() == 0:
            return torch.stack(parts).sum()  # a time
        filling = self._pad_id if key == "tokens" else -1 if key == "sample" else _FILLING.get(key, 0)
        rest = torch.full((free, *parts[0].shape[1:]), filling, dtype=parts[0].dtype)
        if key == "position_ids":
            rest = torch.arange(free)
        return torch.cat([*parts, rest])
