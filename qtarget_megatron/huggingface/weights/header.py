"""The header of a safetensors file: which tensors it holds, and where."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import torch

from qtarget_megatron.huggingface.config.config_file import shown

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_LONGEST_HEADER = 100_000_000  # as the safetensors library has it


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a safetensors header declares it. begin: of its first byte, from the start of the file."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header alone.

    Raises ValueError where the header is malformed, names a tensor twice, leaves a gap between tensors or lets them
    overlap, or the file is longer or shorter than the header says (a download that stopped early). No tensor data is
    read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(
                f"{path}: expected a safetensors header, got {size} bytes that hold none; the "
                "file is truncated or of another kind: fetch it again"
            )
        header = stream.read(length)
    try:
        entries = json.loads(header, object_pairs_hook=_without_repeats)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path.name, entry, 8 + length) for name, entry in entries.items()}
        end = 8 + length
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.nbytes)):
            if tensor.begin != end:
                raise ValueError(f"a tensor begins at byte {tensor.begin}, the one before it ends at {end}")
            end += tensor.nbytes
    except RecursionError:
        raise ValueError(f"{path}: expected a safetensors header, got JSON nested too deep to read") from None
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"{path}: expected a safetensors header, got {shown(error)}") from None
    if end != size:
        raise ValueError(
            f"{path}: expected {end} bytes by its header, got {size}; the file is truncated or damaged: fetch it again"
        )
    return tensors


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} twice")
    return found


def _entry(file: str, entry: dict, data: int) -> TensorEntry:
    """data: where the data of the file begins."""
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    dtype = DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"data_offsets {begin, end} do not fit shape {shape} of {entry['dtype']}")
    return TensorEntry(file=file, shape=shape, dtype=dtype, begin=data + begin)
