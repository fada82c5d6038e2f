"""Write a Hugging Face checkpoint: all of it, or nothing under the final name.

Every process that owns tensors writes its own shards, tensor by tensor, into one folder next to the final one; a
single process then adds the index, the config and the tokenizer and renames the folder.

    plan = plan_shards(arch, dtype, stages=stages)      # the same on every process
    export = HFExport(out, source, arch, plan, dtype=dtype, made_from=made_from)
    export.begin()                                      # one process, then a barrier
    if not export.holds_shard(file):                    # the owner of each shard
        export.write_shard(file, tensors)               # then a barrier
    export.finish()                                     # one process
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qtarget_megatron.huggingface.config import families
from qtarget_megatron.huggingface.config.architecture import Architecture
from qtarget_megatron.huggingface.config.config_file import declared_dtype, dtype_name, read_config
from qtarget_megatron.huggingface.config.model_files import model_file
from qtarget_megatron.huggingface.config.quantization import QUANTIZATION_KEYS
from qtarget_megatron.huggingface.weights.reader import INDEX_FILE, SINGLE_FILE, is_finite
from qtarget_megatron.huggingface.weights.safetensors_file import PlannedTensor, SafetensorsFile, file_bytes
from qtarget_megatron.huggingface.weights.tensors import hf_tensor_shapes, tensor_dtype
from qtarget_megatron.resumable import ResumableDirectory, check_space, sync

ShardPlan = list[tuple[str, list[str]]]

# Beside the weights: tokenizer, chat template and generation settings, by file kind.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


def plan_shards(
    arch: Architecture,
    dtype: torch.dtype,
    *,
    stages: Sequence[Sequence[str]],
    max_shard_bytes: float = 5e9,
) -> ShardPlan:
    """Which tensors go into which file: [(file name, tensor names), ...].

    ``stages``: the tensors each pipeline stage holds. They are filled into files in the given
    order, a new one when the next tensor would exceed ``max_shard_bytes`` (bytes of tensor data in
    ``dtype``; a tensor larger than that has a file of its own); no file mixes two stages. A pure
    function of its arguments, so every process computes the same plan. ValueError unless the stages
    together hold every tensor of the architecture once.
    """
    shapes = hf_tensor_shapes(arch)
    held = Counter(name for stage in stages for name in stage)
    for what, wrong in (
        ("without", [name for name in shapes if name not in held]),
        ("with the unknown", [name for name in held if name not in shapes]),
        ("with a repeated", [name for name, count in held.items() if count > 1]),
    ):
        if wrong:
            raise ValueError(
                f"expected the stages to hold each of the {len(shapes)} tensors once, got a plan "
                f"{what} {', '.join(wrong[:3])}"
            )
    if not max_shard_bytes > 0:
        raise ValueError(f"expected max_shard_bytes above 0, got {max_shard_bytes}")
    groups: list[list[str]] = []
    for stage in stages:
        filled = math.inf  # the first tensor of a stage opens a file
        for name in stage:
            size = math.prod(shapes[name]) * tensor_dtype(name, dtype).itemsize
            if filled + size > max_shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
    if len(groups) == 1:
        return [(SINGLE_FILE, groups[0])]
    return [(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def copied_files(source_dir: str | Path) -> list[Path]:
    """The files that an export carries over besides config.json, relative to the directory that they lie in.

    ValueError where one is a link out of it, or cannot be read: worth calling before hours of training.
    """
    source_dir, found = Path(source_dir), []
    for pattern in _COPIED:
        for source in sorted(source_dir.glob(pattern)):
            relative = source.relative_to(source_dir)
            if source.is_dir() or source.name == "config.json" or ".index." in source.name:
                continue
            path = model_file(source_dir, relative)
            try:
                with path.open("rb") as file:
                    file.read(1)
            except OSError as error:
                raise ValueError(
                    f"{path}: expected a file to copy into the export, got: {error.strerror}; make it readable, or "
                    "remove it"
                ) from error
            found.append(relative)
    return found


def export_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Bytes of the tensors of an export, at least what it takes on a disk."""
    return sum(math.prod(shape) * tensor_dtype(name, dtype).itemsize for name, shape in hf_tensor_shapes(arch).items())


class HFExport:
    """An export into ``out_dir`` that becomes visible only when it is complete.

    ``source_dir``: the checkpoint whose config, tokenizer and chat template are carried over.
    ``dtype``: of all exported tensors; the architecture's own by default. ``made_from``: what the tensors come from, by
    the name that the user knows it by; an export that was interrupted leaves a hidden folder, from which one made from
    the same takes the shards that were complete. None: such shards are of no use. The constructor checks and writes
    nothing.
    """

    def __init__(
        self,
        out_dir: str | Path,
        source_dir: str | Path,
        arch: Architecture,
        plan: ShardPlan,
        *,
        made_from: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.source_dir = Path(source_dir)
        read_config(self.source_dir)
        copied_files(self.source_dir)
        self._dtype = dtype or arch.dtype
        self._plan = {file: list(names) for file, names in plan}
        self._arch, self._shapes = arch, hf_tensor_shapes(arch)
        if made_from is not None:
            files = hashlib.sha256(json.dumps(self._plan).encode()).hexdigest()
            made_from = {**made_from, "dtype": dtype_name(self._dtype), "number of pipeline stages": files}
        self.directory = ResumableDirectory(out_dir, made_from)
        self.directory.check()

    def begin(self) -> None:
        """Make the folder (one process); ValueError where it is of another export, or the disk is too small."""
        self.directory.open()
        present = [self.directory.folder / file for file in self._plan]
        there = sum(path.stat().st_size for path in present if path.is_file())
        check_space(self.directory.folder, sum(map(self.shard_bytes, self._plan)) - there)

    def shard_bytes(self, file: str) -> int:
        """Size of a planned file."""
        return file_bytes(self._planned(file))

    def holds_shard(self, file: str) -> bool:
        """Whether an earlier run wrote this file to its end, and it is still what it was; reads it."""
        return self.directory.holds(file)

    def write_shard(self, file: str, tensors: Iterable[tuple[str, Iterable[Tensor]]]) -> None:
        """Write one planned file; one tensor is in memory at a time if tensors and their pieces are made on the way.

        tensors: (name, pieces along the first dimension), in any order, on any device, in the export dtype. ValueError
        for a file that is not planned, tensors that differ from the plan in names, shapes or dtype, or are not finite.
        """
        path = self.directory.folder / file
        with SafetensorsFile(path, self._planned(file)) as shard:
            for name, pieces in tensors:
                shard.write(name, self._finite(name, pieces))
            shard.check_complete()
        self.directory.record(file)

    def _finite(self, name: str, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        for piece in pieces:
            if not is_finite(piece):
                raise ValueError(
                    f"{self.directory.path}: expected finite weights to export, got NaN or infinity in {name}: the "
                    f"training has diverged, or {self._dtype} does not hold its numbers"
                )
            yield piece

    def _planned(self, file: str) -> dict[str, PlannedTensor]:
        if file not in self._plan:
            raise ValueError(f"expected one of the {len(self._plan)} planned files, got {file!r}")
        return {name: PlannedTensor(self._shapes[name], tensor_dtype(name, self._dtype)) for name in self._plan[file]}

    def finish(self) -> dict[str, str]:
        """Complete the checkpoint and give it its final name (one process, after all shards).

        Returns the SHA-256 of each file. ValueError if a planned shard is missing or incomplete.
        """
        folder = self.directory.folder
        for file in self._plan:
            if not self.directory.recorded(file):
                raise ValueError(f"{folder}: expected the shard {file}, found none; its owner did not write it")
            if (size := (folder / file).stat().st_size) != self.shard_bytes(file):
                raise ValueError(
                    f"{folder / file}: expected {self.shard_bytes(file)} bytes, got {size}; the file is truncated: run "
                    "again"
                )
        if list(self._plan) != [SINGLE_FILE]:
            self._write(INDEX_FILE, _json_bytes(self._index()))
        for relative in copied_files(self.source_dir):
            self._write(relative, (self.source_dir / relative).read_bytes())
        # The last: without it the folder is no model.
        self._write("config.json", self._config_bytes())
        digests = self.directory.digests()
        self.directory.finish()
        return digests

    def _index(self) -> dict:
        total = sum(tensor.nbytes for file in self._plan for tensor in self._planned(file).values())
        return {
            "metadata": {"total_size": total},
            "weight_map": {n: file for file, names in self._plan.items() for n in names},
        }

    def _config_bytes(self) -> bytes:
        """The source's config, byte for byte unless its dtype differs from the exported one, or it says of the source
        what is not so of the export: how weights are quantised, and that there are layers for further tokens."""
        config = read_config(self.source_dir)
        left_out = [key for key in QUANTIZATION_KEYS if config.pop(key, None)]
        if self._arch.further_layers and not self._arch.has_further:
            family = families.by_name(self._arch.family)
            keys = [key for key, meant in family.aliases.items() if meant == family.further_layers and key in config]
            left_out += keys or [family.further_layers]
            config |= dict.fromkeys(keys or [family.further_layers], 0)
        if declared_dtype(config) == self._dtype and not left_out:
            return (self.source_dir / "config.json").read_bytes()
        # Older transformers know only torch_dtype, and newer ones still read it.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = dtype_name(self._dtype)
        return _json_bytes(config)

    def _write(self, relative: str | Path, content: bytes) -> None:
        path = self.directory.folder / relative
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        sync(path)


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
