"""Write one safetensors file tensor by tensor: what it holds in memory is what it is given at a time.

The library's own save_file wants all tensors at once. The format: 8 bytes with the length of the header, the header
(JSON: metadata, and for each tensor its dtype, shape and place in the data), the data. The bytes are those that
save_file writes for the same tensors.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import torch
from torch import Tensor

from qtarget_megatron.huggingface.weights.header import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class PlannedTensor(NamedTuple):
    """A tensor that a file is to hold."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def file_bytes(planned: Mapping[str, PlannedTensor]) -> int:
    """Size of the file that holds these tensors."""
    return len(_header(planned)[0]) + sum(tensor.nbytes for tensor in planned.values())


def _header(
    planned: Mapping[str, PlannedTensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    # The order and the padding are the library's: float32 before 16-bit dtypes, then by name.
    entries: dict[str, dict] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    begins, end = {}, 0
    for name in sorted(planned, key=lambda name: (-planned[name].dtype.itemsize, name.encode())):
        shape, dtype = planned[name]
        begins[name], end = end, end + planned[name].nbytes
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


class SafetensorsFile:
    """A new file for these tensors. A context manager; nothing is synced to the disk."""

    def __init__(self, path: Path, planned: Mapping[str, PlannedTensor], metadata: Mapping[str, str] | None = None):
        """metadata: of the header, besides the format."""
        self.path, self._planned = path, planned
        head, self._begins = _header(planned, metadata)
        self._missing = set(planned)
        self._file = open(path, "wb", buffering=0)
        self._write(memoryview(head), 0)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, name: str, pieces: Iterable[Tensor]) -> int:
        """Write one tensor, given as pieces along its first dimension, of any device; returns its bytes.

        ValueError for a tensor that is not planned, or not of its shape and dtype.
        """
        if name not in self._planned:
            raise ValueError(f"{self.path.name}: expected the {len(self._planned)} planned tensors, got {name} as well")
        (shape, dtype), rows, position = self._planned[name], 0, self._begins[name]
        for piece in pieces:
            rows += piece.shape[0]
            if piece.dtype != dtype or tuple(piece.shape[1:]) != shape[1:] or rows > shape[0]:
                self._refuse(name, (rows, *piece.shape[1:]), piece.dtype)
            data = memoryview(piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._write(data, position)
            position += len(data)
        if rows != shape[0]:
            self._refuse(name, (rows, *shape[1:]), dtype)
        self._missing.discard(name)
        return position - self._begins[name]

    def _refuse(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        planned = self._planned[name]
        raise ValueError(
            f"{self.path.name}: expected {name} as {planned.dtype} {list(planned.shape)}, got {dtype} {list(shape)}"
        )

    def check_complete(self) -> None:
        """ValueError unless every tensor was written."""
        if self._missing:
            raise ValueError(
                f"{self.path.name}: expected the {len(self._planned)} planned tensors, got all but "
                f"{', '.join(sorted(self._missing)[:3])}"
            )

    def _write(self, data: memoryview, position: int) -> None:
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], position + done)
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}; run again to go on from here") from error
