"""config.json as plain JSON, and its fields with their types checked: each error names the field in one line."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qtarget_megatron.huggingface.config.model_files import model_file

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_config(directory: str | Path) -> dict[str, Any]:
    """``directory/config.json`` as a dict. ValueError where it is missing or not a JSON object."""
    directory = Path(directory)
    if not directory.is_dir():
        found = "a file" if os.path.exists(directory) else "none"
        raise ValueError(f"{directory}: expected a checkpoint directory, found {found}; {_advice(directory)}")
    path = model_file(directory, "config.json")
    if not path.is_file():
        raise ValueError(
            f"{directory}: expected a config.json, found none; point to the folder that save_pretrained wrote"
        )
    return read_json_object(path)


def _advice(directory: Path) -> str:
    if _HUB_NAME.fullmatch(str(directory)) and not directory.parent.exists():
        local = f"models/{directory.name}"
        return (
            f"a model of the Hugging Face hub is fetched by `hf download {directory} --local-dir {local}`: give {local}"
        )
    return "check the path"


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is an object; ValueError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path}: expected JSON, got a parse error ({error})") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got lists or objects nested too deep to read") from None
    except OSError as error:
        raise ValueError(f"{path}: expected a file to read, got: {error.strerror}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got a {type(value).__name__}")
    return value


def declared_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """The dtype a config declares (``dtype`` wins over the older ``torch_dtype``), or None."""
    name = config.get("dtype") or config.get("torch_dtype")
    if name is None:
        return None
    if name not in tuple(_DTYPES):
        raise ValueError(f"config.json: expected dtype to be one of {sorted(_DTYPES)}, got {shown(name)}")
    return _DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """A checkpoint dtype as config.json spells it ("bfloat16"); ValueError for other dtypes."""
    for name, value in _DTYPES.items():
        if value == dtype:
            return name
    raise ValueError(f"expected a checkpoint dtype of {sorted(_DTYPES)}, got {dtype}")


def shown(value: Any) -> str:
    """A value for a message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def boolean(config: Mapping[str, Any], key: str) -> bool:
    """config[key], False where it is absent."""
    value = config.get(key, False)
    if not isinstance(value, bool):
        raise ValueError(f"config.json: expected {key} to be true or false, got {shown(value)}")
    return value


def rule(config: Mapping[str, Any], constant_or_key: bool | str) -> bool:
    """The constant, or the boolean field of that name."""
    return constant_or_key if isinstance(constant_or_key, bool) else boolean(config, constant_or_key)


def positive_int(config: Mapping[str, Any], key: str, most: int = 2**31 - 1) -> int:
    """config[key], which must be there. most: no model has more, so that nothing absurd is counted up to or made."""
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ValueError(f"config.json: expected {key} to be a positive integer, got {shown(value)}")
    if value > most:
        raise ValueError(f"config.json: expected {key} of at most {most}, got {shown(value)}")
    return value


def positive_number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """config[key] as a float; it must be there unless there is a default. From 1e-30 to 1e30: float32 holds those."""
    value = config.get(key, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not (0 < value < math.inf):
        raise ValueError(f"config.json: expected {key} to be a positive number, got {shown(value)}")
    if not 1e-30 <= value <= 1e30:
        raise ValueError(f"config.json: expected {key} from 1e-30 to 1e30, got {shown(value)}")
    return float(value)


def token_ids(config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """config[key], an integer or a list of them; empty where it is absent or null."""
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ValueError(
            f"config.json: expected {key} to be an integer, a list of integers or null, got {shown(value)}"
        )
    return tuple(ids)
