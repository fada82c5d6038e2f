"""Read slices of a Hugging Face safetensors checkpoint, one file or several.

Only safetensors and JSON are ever opened. Opening a checkpoint reads the JSON header of every file
and nothing else; tensors are read slice by slice on request.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from qtarget_megatron.huggingface.config.config_file import read_config, read_json_object, shown
from qtarget_megatron.huggingface.config.model_files import model_file

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

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
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
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


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; one pass without a copy, True for integers and 8-bit floats."""
    if tensor.numel() == 0 or not tensor.is_floating_point() or tensor.itemsize == 1:
        return True
    return all(bound.isfinite().item() for bound in torch.aminmax(tensor))  # both are NaN where one number is


def _unreadable(path: Path, error: OSError) -> ValueError:
    advice = "raise ulimit -n" if error.errno in (errno.EMFILE, errno.ENFILE) else "make it readable"
    return ValueError(f"{path}: {error.strerror}; {advice}")


class HFReader:
    """Lazy access to the tensors of the checkpoint in ``directory``.

    Slices are read with read(), not mapped: a mapped file counts as memory of the process, and one that shrinks
    meanwhile would end the process. ``bytes_read`` counts the bytes of the files' data that were read so far. Raises
    ValueError, in one line, for a missing directory, config.json, weight file or shard, a truncated file, an index that
    names a tensor its shard lacks, a tensor that two shards hold, and a link out of the directory. Usable as a context
    manager.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        read_config(self.directory)
        self.bytes_read = 0
        self._entries: dict[str, TensorEntry] = {}
        self._open: dict[str, BinaryIO] = {}
        weight_map = self._find_files()
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
            path = model_file(self.directory, file)
            if not path.is_file():
                raise ValueError(
                    f"{self.directory}: expected the shard {file} that {INDEX_FILE} names, found none; fetch it"
                )
            try:
                entries = read_header(path)
            except OSError as error:
                raise _unreadable(path, error) from error
            for name, entry in entries.items():
                if name in self._entries:
                    raise ValueError(
                        f"{self.directory}: expected each tensor once, got {name} in both "
                        f"{self._entries[name].file} and {file}; remove the stale shard"
                    )
                self._entries[name] = entry
        for name, file in (weight_map or {}).items():
            if name not in self._entries or self._entries[name].file != file:
                raise ValueError(
                    f"{self.directory}: expected {name} in {file} by {INDEX_FILE}, but that shard "
                    "lacks it; index and shards are of different versions: fetch both again"
                )

    def _find_files(self) -> dict[str, str] | None:
        """The index's weight map, or None for a checkpoint of one file."""
        single = (self.directory / SINGLE_FILE).is_file()
        index = model_file(self.directory, INDEX_FILE)
        if single and index.is_file():
            raise ValueError(
                f"{self.directory}: expected either {SINGLE_FILE} or {INDEX_FILE}, found both; remove the stale one"
            )
        if single:
            return None
        if not index.is_file():
            found = sorted(p.name for p in self.directory.iterdir() if p.suffix in _PICKLE_SUFFIXES)
            if found:
                raise ValueError(
                    f"{self.directory}: expected safetensors weights, found only {found[0]}; "
                    "pickle files are never loaded: convert the checkpoint with "
                    "save_pretrained(safe_serialization=True)"
                )
            raise ValueError(
                f"{self.directory}: expected {SINGLE_FILE} or {INDEX_FILE}, found neither; fetch the weights"
            )
        weight_map = read_json_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: expected a weight_map of tensor names to files, got {shown(weight_map)}")
        for file in weight_map.values():
            # The index is data from elsewhere: it may not point outside the checkpoint.
            if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
                raise ValueError(f"{index}: expected plain .safetensors file names, got {shown(file)}")
        return weight_map

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, file by file."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's full shape."""
        return self._entry_of(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype on disk."""
        return self._entry_of(name).dtype

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A tensor on the CPU, in the dtype on disk; all of it or half-open ranges of it.

        ``rows``: range of the first dimension, ``cols``: of the second. Only the bytes of that part
        are read.

        Raises ValueError for an unknown name or a range outside the tensor, and for a weight that is NaN or infinite.
        """
        entry = self._entry_of(name)
        shape = list(entry.shape)
        for dim, wanted in enumerate((rows, cols)):
            if wanted is None:
                continue
            size = shape[dim] if dim < len(shape) else -1
            if not 0 <= wanted[0] <= wanted[1] <= size:
                raise ValueError(
                    f"{name}: expected a range within shape {list(entry.shape)}, got {wanted} in dimension {dim}"
                )
            shape[dim] = wanted[1] - wanted[0]
        tensor = torch.empty(shape, dtype=entry.dtype)
        if tensor.numel() == 0:
            return tensor
        target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        per_row = math.prod(entry.shape[1:]) * entry.dtype.itemsize
        begin = entry.begin + (rows[0] if rows else 0) * per_row
        if cols is None:
            self._read_into(entry.file, target, begin)
        else:
            begin += cols[0] * (per_row // entry.shape[1])
            taken = len(target) // shape[0]
            for row in range(shape[0]):
                self._read_into(entry.file, target[row * taken : (row + 1) * taken], begin + row * per_row)
        if not is_finite(tensor):
            raise ValueError(
                f"{self.directory / entry.file}: expected finite weights, got NaN or infinity in {name}: the file is "
                "damaged, or of a training that diverged: fetch it again, or take another"
            )
        return tensor

    def _read_into(self, file: str, target: memoryview, position: int) -> None:
        """Fill target from this position of the file on."""
        if file not in self._open:
            try:
                self._open[file] = open(self.directory / file, "rb", buffering=0)
            except OSError as error:
                raise _unreadable(self.directory / file, error) from error
        descriptor, done = self._open[file].fileno(), 0
        while done < len(target):
            try:
                count = os.preadv(descriptor, [target[done:]], position + done)
            except OSError as error:
                raise ValueError(f"{self.directory / file}: {error.strerror}; fetch it again") from error
            if count == 0:
                raise ValueError(f"{self.directory / file} became shorter while it was read: fetch it again")
            done += count
            self.bytes_read += count

    def close(self) -> None:
        """Let go of the open files; a later read opens them again."""
        while self._open:
            self._open.popitem()[1].close()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_open"):  # the constructor may have raised
            self.close()

    def _entry_of(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ValueError(f"{self.directory}: expected a tensor named {name}, found none")
        return self._entries[name]
