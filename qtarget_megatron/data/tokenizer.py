"""Loading a tokenizer from a directory, and comparing two."""

from __future__ import annotations

import os
from functools import lru_cache
from pathlib import Path
from typing import Any


def load_tokenizer(directory: str | os.PathLike[str]) -> Any:
    """The fast tokenizer in a local directory; no network, no code from the directory.

    Raises ValueError when the directory has no tokenizer, only an empty one, or one without the
    character offsets that supervision needs (a "slow" tokenizer).
    """
    path = str(directory)
    if not Path(path).is_dir():
        raise ValueError(f"tokenizer: expected a directory, got {path!r}")
    # Imported late, here and below: seconds, which processes that read no text do not spend.
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # files from elsewhere: RecursionError, huggingface_hub's own errors, any may come
        raise ValueError(f"no tokenizer can be loaded from {path!r}: {one_line(error)}") from error
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise ValueError(f"expected a fast tokenizer (tokenizer.json) in {path!r}, got {kind}")
    # A model directory without tokenizer files loads too: transformers invents special tokens.
    ordinary = set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab())
    if not ordinary - set(tokenizer.all_special_tokens):
        raise ValueError(f"no tokenizer in {path!r}: expected tokenizer.json, got no vocabulary")
    return tokenizer


def compare_tokenizers(student: Any, teacher: Any, *, limit: int = 3) -> None:
    """Raise ValueError naming the first ``limit`` ids that stand for different tokens.

    Only ids count: the teacher reads the ids that the student's tokenizer wrote. Embedding matrices
    padded to different sizes are no difference, because padding rows have no token.
    """
    here = {index: repr(token) for token, index in student.get_vocab().items()}
    there = {index: repr(token) for token, index in teacher.get_vocab().items()}
    differing = sorted(i for i in here.keys() | there.keys() if here.get(i) != there.get(i))
    if differing:
        shown = "; ".join(
            f"id {i}: {here.get(i, 'no token')} here, {there.get(i, 'no token')} there" for i in differing[:limit]
        )
        raise ValueError(
            f"student and teacher vocabularies differ in {len(differing)} ids ({shown}); "
            "use a teacher that shares the student's vocabulary"
        )


@lru_cache(maxsize=8)
def all_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that a tokenizer has a token for."""
    return frozenset(tokenizer.get_vocab().values())


@lru_cache(maxsize=8)
def added_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer's added tokens, special or not, and of its special tokens."""
    return frozenset(tokenizer.added_tokens_decoder) | special_ids(tokenizer)


@lru_cache(maxsize=8)
def special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids of a tokenizer's special tokens, those of its added tokens included."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(added | set(tokenizer.all_special_ids))


def one_line(error: Exception) -> str:
    """The text of an error without line breaks; its type's name where it has none."""
    return " ".join(str(error).split()) or type(error).__name__
