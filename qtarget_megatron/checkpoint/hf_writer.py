"""Write a Hugging Face checkpoint: all of it, or nothing under the final name.

Every process that owns tensors writes its own shards into one temporary folder next to the final
one; a single process then adds the index, the config and the tokenizer and renames the folder.

    plan = plan_shards(arch, dtype, stages=stages)      # the same on every process
    export = HFExport(out, source, arch, plan, dtype=dtype, temporary_name=name)
    export.begin()                                      # one process, then a barrier
    export.write_shard(file, tensors)                   # the owner of each shard, then a barrier
    export.finish()                                     # one process
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from qtarget_megatron.checkpoint.architecture import Architecture
from qtarget_megatron.checkpoint.config_file import declared_dtype, dtype_name, read_config
from qtarget_megatron.checkpoint.hf_reader import INDEX_FILE, SINGLE_FILE, TensorEntry, read_header
from qtarget_megatron.checkpoint.hf_tensors import hf_tensor_shapes, tensor_dtype

ShardPlan = list[tuple[str, list[str]]]

# Beside the weights: tokenizer, chat template and generation settings, by file kind.
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja")


def check_output_directory(path: str | Path) -> None:
    """Raise ValueError if ``path`` could not become an export directory. Writes nothing.

    It must not exist, or be an empty directory, and its parent must be a directory. Worth calling
    before hours of training.
    """
    path = Path(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path}: expected a new or empty directory, got a file or link; choose another")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{path}: expected a new or empty directory, got one with files in it; choose another or empty it"
        )
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{path}: expected its parent to be a directory, found none; create {path.absolute().parent}")


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


class HFExport:
    """An export into ``out_dir`` that becomes visible only when it is complete.

    ``source_dir``: the checkpoint whose config, tokenizer and chat template are carried over.
    ``dtype``: of all exported tensors; the architecture's own by default. ``temporary_name``: the
    name of the temporary folder, a sibling of ``out_dir``; all processes of one export must pass
    the same, and different exports different ones. The constructor checks and writes nothing; an
    export that is interrupted leaves the temporary folder and no ``out_dir``.
    """

    def __init__(
        self,
        out_dir: str | Path,
        source_dir: str | Path,
        arch: Architecture,
        plan: ShardPlan,
        *,
        temporary_name: str,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_output_directory(out_dir)
        self.out_dir = Path(out_dir).absolute()
        self.source_dir = Path(source_dir)
        read_config(self.source_dir)
        self._dtype = dtype or arch.dtype
        dtype_name(self._dtype)
        self._plan = {file: list(names) for file, names in plan}
        self._shapes = hf_tensor_shapes(arch)
        self.temporary_dir = self.out_dir.parent / temporary_name
        reserved = ("", ".", "..", self.out_dir.name)
        if temporary_name in reserved or Path(temporary_name).name != temporary_name:
            raise ValueError(f"expected a plain folder name other than {self.out_dir.name!r}, got {temporary_name!r}")

    def begin(self) -> None:
        """Create the temporary folder (one process); ValueError if it is already there."""
        check_output_directory(self.out_dir)
        try:
            self.temporary_dir.mkdir()
        except FileExistsError:
            raise ValueError(
                f"{self.temporary_dir}: expected no such folder, found one of another or an "
                "interrupted export; delete it or pass another temporary_name"
            ) from None

    def write_shard(self, file: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Write one planned file. Tensors may lie on any device, in the export dtype.

        ValueError for a file that is not planned, or tensors that differ from the plan in names,
        shapes or dtype.
        """
        planned = self._plan.get(file)
        if planned is None:
            raise ValueError(f"expected one of the {len(self._plan)} planned files, got {file!r}")
        self._compare(file, {n: TensorEntry(file, tuple(t.shape), t.dtype) for n, t in tensors.items()})
        path = self.temporary_dir / file
        save_file({name: tensors[name].contiguous() for name in planned}, path, metadata={"format": "pt"})
        # safetensors makes the file private to its owner; give it the mode of any other new file.
        path.chmod(0o666 & ~_umask())
        _sync(path)

    def finish(self) -> None:
        """Complete the checkpoint and give it its final name (one process, after all shards).

        ValueError if a planned shard is missing or incomplete.
        """
        check_output_directory(self.out_dir)
        for file in self._plan:
            path = self.temporary_dir / file
            if not path.is_file():
                raise ValueError(
                    f"{self.temporary_dir}: expected the shard {file}, found none; its owner did not write it"
                )
            self._compare(file, read_header(path))
        if list(self._plan) != [SINGLE_FILE]:
            self._write(INDEX_FILE, _json_bytes(self._index()))
        self._write("config.json", self._config_bytes())
        for pattern in _COPIED:
            for source in sorted(self.source_dir.glob(pattern)):
                relative = source.relative_to(self.source_dir)
                if source.is_file() and source.name != "config.json" and ".index." not in source.name:
                    self._write(relative, source.read_bytes())
        for folder in {path.parent for path in self.temporary_dir.rglob("*")}:
            _sync(folder)
        os.rename(self.temporary_dir, self.out_dir)
        _sync(self.out_dir.parent)

    def _compare(self, file: str, found: Mapping[str, TensorEntry]) -> None:
        planned = self._plan[file]
        if found.keys() != set(planned):
            different = sorted(found.keys() ^ set(planned))
            raise ValueError(
                f"{file}: expected the {len(planned)} planned tensors, got a set that differs in "
                f"{', '.join(different[:3])}"
            )
        for name, entry in found.items():
            if (entry.shape, entry.dtype) != (self._shapes[name], tensor_dtype(name, self._dtype)):
                raise ValueError(
                    f"{file}: expected {name} as {tensor_dtype(name, self._dtype)} {list(self._shapes[name])}, got "
                    f"{entry.dtype} {list(entry.shape)}"
                )

    def _index(self) -> dict:
        total = sum(
            math.prod(self._shapes[name]) * tensor_dtype(name, self._dtype).itemsize
            for names in self._plan.values()
            for name in names
        )
        return {
            "metadata": {"total_size": total},
            "weight_map": {n: file for file, names in self._plan.items() for n in names},
        }

    def _config_bytes(self) -> bytes:
        """The source's config, byte for byte unless its dtype differs from the exported one."""
        config = read_config(self.source_dir)
        if declared_dtype(config) == self._dtype:
            return (self.source_dir / "config.json").read_bytes()
        # Older transformers know only torch_dtype, and newer ones still read it.
        for key in [key for key in ("dtype", "torch_dtype") if key in config] or ["torch_dtype"]:
            config[key] = dtype_name(self._dtype)
        return _json_bytes(config)

    def _write(self, relative: str | Path, content: bytes) -> None:
        path = self.temporary_dir / relative
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        _sync(path)


def _json_bytes(value: dict) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    """Have the kernel put a file or folder on the disk before the rename makes it visible."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
