"""Read slices of a Hugging Face safetensors checkpoint, one file or several.

Only safetensors and JSON are ever opened. Opening a checkpoint reads the JSON header of every file
and nothing else; tensors are read slice by slice on request.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from safetensors import safe_open

from qtarget_megatron.checkpoint.config_file import read_config, read_json_object

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_DTYPES = {
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


@dataclass(frozen=True)
class TensorEntry:
    """One tensor as a safetensors header declares it."""

    file: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, from its header alone.

    Raises ValueError where the header is malformed or the file is longer or shorter than the header
    says (a download that stopped early). No tensor data is read.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise ValueError(
                f"{path}: expected a safetensors header, got {size} bytes that hold none; the "
                "file is truncated or of another kind: fetch it again"
            )
        header = stream.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        tensors = {name: _entry(path.name, entry) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: expected a safetensors header, got {error!r}") from None
    if 8 + length + end != size:
        raise ValueError(
            f"{path}: expected {8 + length + end} bytes by its header, got {size}; the file is "
            "truncated or damaged: fetch it again"
        )
    return tensors


def _entry(file: str, entry: dict) -> TensorEntry:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"unknown dtype {entry['dtype']!r}")
    dtype = _DTYPES[entry["dtype"]]
    begin, end = entry["data_offsets"]
    shape = tuple(int(n) for n in entry["shape"])
    if min(shape, default=0) < 0 or begin < 0 or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"data_offsets {begin, end} do not fit shape {shape} of {entry['dtype']}")
    return TensorEntry(file=file, shape=shape, dtype=dtype)


class HFReader:
    """Lazy access to the tensors of the checkpoint in ``directory``.

    ``bytes_read`` counts the bytes of all slices returned so far. Raises ValueError, in one line,
    for a missing directory, config.json, weight file or shard, a truncated file, an index that
    names a tensor its shard lacks, and a tensor that two shards hold. Usable as a context manager.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        read_config(self.directory)
        self.bytes_read = 0
        self._entries: dict[str, TensorEntry] = {}
        self._open: dict[str, safe_open] = {}
        weight_map = self._find_files()
        for file in sorted(set(weight_map.values())) if weight_map is not None else [SINGLE_FILE]:
            path = self.directory / file
            if not path.is_file():
                raise ValueError(
                    f"{self.directory}: expected the shard {file} that {INDEX_FILE} names, found none; fetch it"
                )
            for name, entry in read_header(path).items():
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
        index = self.directory / INDEX_FILE
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
            raise ValueError(f"{index}: expected a weight_map of tensor names to files, got {weight_map!r}")
        for file in weight_map.values():
            # The index is data from elsewhere: it may not point outside the checkpoint.
            if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != ".safetensors":
                raise ValueError(f"{index}: expected plain .safetensors file names, got {file!r}")
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

        Raises ValueError for an unknown name or a range outside the tensor.
        """
        entry = self._entry_of(name)
        index = []
        for dim, wanted in enumerate((rows, cols)):
            if wanted is None:
                index.append(slice(None))
                continue
            size = entry.shape[dim] if dim < len(entry.shape) else -1
            if not 0 <= wanted[0] <= wanted[1] <= size:
                raise ValueError(
                    f"{name}: expected a range within shape {list(entry.shape)}, got {wanted} in dimension {dim}"
                )
            index.append(slice(*wanted))
        if entry.file not in self._open:
            self._open[entry.file] = safe_open(self.directory / entry.file, framework="pt")
        view = self._open[entry.file].get_slice(name)[tuple(index[: len(entry.shape)])]
        self.bytes_read += view.nbytes
        # safetensors may hand out a view of the mapped file; the copy is what reads it, and it does
        # not depend on the file from then on.
        return view.clone(memory_format=torch.contiguous_format)

    def close(self) -> None:
        """Let go of the open files; a later read opens them again."""
        self._open.clear()

    def __enter__(self) -> HFReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _entry_of(self, name: str) -> TensorEntry:
        if name not in self._entries:
            raise ValueError(f"{self.directory}: expected a tensor named {name}, found none")
        return self._entries[name]
