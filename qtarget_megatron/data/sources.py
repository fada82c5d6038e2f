"""What the words of --sft-train and --sft-valid name: files and folders with their shares, and held-out sets."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Source:
    """A file or folder of records. weight: its share of an epoch, in the unit of the other sources' weights."""

    path: Path
    weight: float | None = None


@dataclass(frozen=True)
class HeldOutSet:
    """A file or folder of held-out records, and its name in the log."""

    path: Path
    name: str


def training_sources(words: Sequence[str]) -> list[Source]:
    """PATH or PATH:WEIGHT each. ValueError for weights that are none, or that some have and others not, and for a
    source that comes twice."""
    sources = [_weighted(word) for word in words]
    if len({source.weight is None for source in sources}) > 1:
        without = next(source.path for source in sources if source.weight is None)
        raise ValueError(
            f"--sft-train {without}: the others have a weight, this has none: give all of them one, or none"
        )
    _refuse_twice("--sft-train", [str(source.path) for source in sources])
    return sources


def held_out_sets(words: Sequence[str]) -> list[HeldOutSet]:
    """PATH or NAME=PATH each; without a name the file's. ValueError for two sets of one name."""
    sets = [_named(word) for word in words]
    _refuse_twice("--sft-valid", [held_out.name for held_out in sets], "give names, as --sft-valid a=FILE b=FILE")
    return sets


def _weighted(word: str) -> Source:
    path, _, text = word.rpartition(":")
    # A name with a colon in it; of one that is not there the data's reader says so.
    if os.path.exists(word) or not path or not (os.path.exists(path) or _is_number(text)):
        return Source(Path(word))
    try:
        weight = float(text)
    except ValueError:
        raise ValueError(f"--sft-train {word}: expected a number behind the colon, a weight, got {text!r}") from None
    if not 0 < weight < math.inf:
        raise ValueError(f"--sft-train {word}: expected a weight above 0, got {text}: drop a source of no weight")
    return Source(Path(path), weight)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _named(word: str) -> HeldOutSet:
    name, equals, path = word.partition("=")
    if equals and name and os.sep not in name and not os.path.exists(word):
        return HeldOutSet(Path(path), name)
    base = Path(word).name
    return HeldOutSet(Path(word), base.partition(".")[0] or base)


def _refuse_twice(flag: str, names: Sequence[str], advice: str = "give it once, with a weight") -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"{flag} has {name} {names.count(name)} times: {advice}")
