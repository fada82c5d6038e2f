"""cache.json: the header of a cache, whether it is complete, and its parts."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from qtarget_megatron.teacher_cache.header import CacheHeader
from qtarget_megatron.teacher_cache.parts import Part

PROGRAM = "qtarget cache-teacher"
INDEX_FILE, VOCABULARY_FILE = "cache.json", "vocabulary.json"
_LARGEST = (1 << 63) - 1
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
        version = entries["version"]
        if entries["format"] != _FORMAT or type(version) is not int:
            raise KeyError("format")
        entries.setdefault("date", None)  # older caches have none
        header = {field.name: entries[field.name] for field in dataclasses.fields(CacheHeader)}
        if version == _VERSION:
            index = Index(CacheHeader(**header), entries["complete"] is True, [Part(**p) for p in entries["parts"]])
            _check(index)
            return index
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(
            f"{directory}: expected a directory that {PROGRAM} wrote, got no valid {INDEX_FILE}: check the path"
        ) from None
    raise ValueError(f"{path} has version {version}, expected {_VERSION}: write the cache again with this program")


# Types of the fields that are no text.
_NUMBERS = {
    **dict.fromkeys(("num_samples", "vocab_size", "seq_length", "k"), int),
    **dict.fromkeys(("first", "samples", "tokens", "entries", "bytes", "head_crc32", "max_id"), int),
    **dict.fromkeys(("top_p", "tail"), float),
}


def _check_types(record: CacheHeader | Part) -> None:
    for field in dataclasses.fields(record):
        value, kind = getattr(record, field.name), _NUMBERS.get(field.name, str)
        optional = field.name in ("top_p", "teacher_checkpoint", "date")
        whole = kind is not int or -1 <= value <= _LARGEST
        if not (optional and value is None) and not (type(value) is kind and whole):
            raise ValueError(field.name)


def _check(index: Index) -> None:
    _check_types(index.header)
    following = 0
    for part in index.parts:
        _check_types(part)
        if not 0 <= part.tail <= part.tokens + 1 or part.max_id >= index.header.vocab_size:
            raise ValueError("parts")
        if part.first != following or part.samples < 1 or Path(part.file).name != part.file:
            raise ValueError("parts")
        following += part.samples
    if following != (index.header.num_samples if index.complete else 0):
        raise ValueError("samples")
