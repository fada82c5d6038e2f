"""cache.json: the header of a cache, whether it is complete, and its parts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from qtarget_megatron.teacher_cache.header import CacheHeader
from qtarget_megatron.teacher_cache.parts import Part

PROGRAM = "python -m qtarget_megatron.commands.cache_teacher"
INDEX_FILE, VOCABULARY_FILE = "cache.json", "vocabulary.json"
_FORMAT, _VERSION = "qtarget_megatron teacher cache", 1


@dataclass(frozen=True)
class Index:
    """parts: those of a complete cache, in order."""

    header: CacheHeader
    complete: bool
    parts: list[Part]

    def to_json(self) -> bytes:
        entries = {"format": _FORMAT, "version": _VERSION, "complete": self.complete, **dataclasses.asdict(self.header)}
        entries["parts"] = [dataclasses.asdict(part) for part in self.parts]
        return json.dumps(entries, indent=1).encode()


def read_index(directory: Path) -> Index:
    """The index of a cache. ValueError, one line, where there is none, or none that this version reads."""
    path = directory / INDEX_FILE
    try:
        entries = json.loads(path.read_bytes())
        if entries["format"] != _FORMAT:
            raise KeyError("format")
        version = entries["version"]
        header = {field.name: entries[field.name] for field in dataclasses.fields(CacheHeader)}
        if version == _VERSION:
            index = Index(CacheHeader(**header), entries["complete"] is True, [Part(**p) for p in entries["parts"]])
            _check(index)
            return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{directory}: expected a directory that {PROGRAM} wrote, got no valid {INDEX_FILE}: check the path"
        ) from None
    raise ValueError(f"{path} has version {version}, expected {_VERSION}: write the cache again with this program")


def _check(index: Index) -> None:
    following = 0
    for part in index.parts:
        if part.first != following or part.samples < 1 or Path(part.file).name != part.file:
            raise ValueError("parts")
        following += part.samples
    if following != (index.header.num_samples if index.complete else 0):
        raise ValueError("samples")
