"""Read slices of a Hugging Face safetensors checkpoint, one file or several.

Only safetensors and JSON are ever opened. Opening a checkpoint reads the JSON header of every file
and nothing else; tensors are read slice by slice on request.
"""

from __future__ import annotations

import errno
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch

from qtarget_megatron.huggingface.config.config_file import read_config, read_json_object, shown
from qtarget_megatron.huggingface.config.model_files import model_file
from qtarget_megatron.huggingface.config.quantization import read_quantization
from qtarget_megatron.huggingface.weights.header import TensorEntry, read_header
from qtarget_megatron.huggingface.weights.quantized import Quantized, find_quantized

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")


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
    meanwhile would end the process. A tensor that is quantised, as config.json's quantization_config says, is one
    bfloat16 tensor here, and its scales are none. ``bytes_read`` counts the bytes of the files' data that were read so
    far. Raises ValueError, in one line, for a missing directory, config.json, weight file or shard, a truncated file,
    an index that names a tensor its shard lacks, a tensor that two shards hold, scales that do not fit their tensor, a
    quantisation that is not read, and a link out of the directory. Usable as a context
    manager.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        config = read_config(self.directory)
        try:
            quantization = read_quantization(config)
        except ValueError as error:
            raise ValueError(f"{self.directory}/{error}") from None
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
        try:
            self._quantized = find_quantized(self._entries, quantization)
        except ValueError as error:
            raise ValueError(f"{self.directory}: {error}") from None

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
        logical = {quantized.parts[0]: name for name, quantized in self._quantized.items()}
        scales = {quantized.parts[1] for quantized in self._quantized.values()}
        return tuple(logical.get(name, name) for name in self._entries if name not in scales)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's full shape."""
        return self._tensor(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that read() gives: the one on disk, bfloat16 of a quantised tensor."""
        return self._tensor(name).dtype

    def read(
        self,
        name: str,
        rows: tuple[int, int] | None = None,
        cols: tuple[int, int] | None = None,
        last: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """A tensor on the CPU, in dtype(name); all of it or half-open ranges of it.

        ``rows``: range of the first dimension, ``cols``: of the second, ``last``: of the third. Only the bytes of that
        part are read.

        Raises ValueError for an unknown name or a range outside the tensor, and for a weight that is NaN or infinite.
        """
        shape, ranges = self._tensor(name).shape, []
        for dim, wanted in enumerate((rows, cols, last)):
            if dim >= len(shape) and wanted is None:
                continue
            size = shape[dim] if dim < len(shape) else -1
            begin, end = wanted or (0, size)
            if not 0 <= begin <= end <= size:
                raise ValueError(
                    f"{name}: expected a range within shape {list(shape)}, got {wanted} in dimension {dim}"
                )
            ranges.append((begin, end))
        ranges += [(0, size) for size in shape[3:]]
        quantized = self._quantized.get(name)
        tensor = self._slice(name, ranges) if quantized is None else quantized.read(self._slice, ranges)
        if not is_finite(tensor):
            file = self._entries[name if quantized is None else quantized.parts[0]].file
            raise ValueError(
                f"{self.directory / file}: expected finite weights, got NaN or infinity in {name}: the file is "
                "damaged, or of a training that diverged: fetch it again, or take another"
            )
        return tensor

    def _slice(self, name: str, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
        """A part of a tensor as it is on the disk, a range of each dimension."""
        entry = self._entries[name]
        tensor = torch.empty([end - begin for begin, end in ranges], dtype=entry.dtype)
        if tensor.numel() == 0:
            return tensor
        target = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        # Dimensions behind the last one that is cut lie together with it.
        cut = [dim for dim, (begin, end) in enumerate(ranges) if end - begin < entry.shape[dim]]
        outer = ranges[: cut[-1]] if cut else []
        strides = [math.prod(entry.shape[dim + 1 :]) * entry.dtype.itemsize for dim in range(len(ranges))]
        first = ranges[cut[-1]][0] * strides[cut[-1]] if cut else 0
        taken = len(target) // math.prod(end - begin for begin, end in outer)
        for number, place in enumerate(itertools.product(*(range(*dim) for dim in outer))):
            position = entry.begin + first + sum(i * stride for i, stride in zip(place, strides, strict=False))
            self._read_into(entry.file, target[number * taken : (number + 1) * taken], position)
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

    def _tensor(self, name: str) -> TensorEntry | Quantized:
        found = self._quantized.get(name) or self._entries.get(name)
        if found is None:
            raise ValueError(f"{self.directory}: expected a tensor named {name}, found none")
        return found
