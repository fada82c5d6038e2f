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

import torch
from torch import Tensor

from qtarget_megatron.checkpoint.hf_reader import DTYPES

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def file_bytes(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> int:
    """Size of the file that holds tensors of these shapes."""
    return len(_header(shapes, dtype)[0]) + sum(map(math.prod, shapes.values())) * dtype.itemsize


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins."""
    # The order and the padding are the library's; with one dtype its order is that of the names.
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    begins, end = {}, 0
    for name in sorted(shapes, key=lambda name: name.encode()):
        begins[name], end = end, end + math.prod(shapes[name]) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": list(shapes[name]), "data_offsets": [begins[name], end]}
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


class SafetensorsFile:
    """A new file for tensors of these shapes, all of one dtype. A context manager; nothing is synced to the disk."""

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self.path, self._shapes, self._dtype = path, shapes, dtype
        head, self._begins = _header(shapes, dtype)
        self._missing = set(shapes)
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
        if name not in self._shapes:
            raise ValueError(f"{self.path.name}: expected the {len(self._shapes)} planned tensors, got {name} as well")
        shape, rows, position = self._shapes[name], 0, self._begins[name]
        for piece in pieces:
            rows += piece.shape[0]
            if piece.dtype != self._dtype or tuple(piece.shape[1:]) != shape[1:] or rows > shape[0]:
                self._refuse(name, (rows, *piece.shape[1:]), piece.dtype)
            data = memoryview(piece.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
            self._write(data, position)
            position += len(data)
        if rows != shape[0]:
            self._refuse(name, (rows, *shape[1:]), self._dtype)
        self._missing.discard(name)
        return position - self._begins[name]

    def _refuse(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        raise ValueError(
            f"{self.path.name}: expected {name} as {self._dtype} {list(self._shapes[name])}, got {dtype} {list(shape)}"
        )

    def check_complete(self) -> None:
        """ValueError unless every tensor was written."""
        if self._missing:
            raise ValueError(
                f"{self.path.name}: expected the {len(self._shapes)} planned tensors, got all but "
                f"{', '.join(sorted(self._missing)[:3])}"
            )

    def _write(self, data: memoryview, position: int) -> None:
        try:
            done = 0
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], position + done)
        except OSError as error:
            raise ValueError(f"{self.path}: {error.strerror}; run again to go on from here") from error
