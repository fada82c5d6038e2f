"""Quantised weights: what config.json says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qtarget_megatron.huggingface.config.config_file import shown

# Where a config.json says how weights are quantised.
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
_READ = "blocks of fp8 (quant_method fp8 with weight_block_size) or mxfp4"
# A block has no more rows or columns: the largest published ones have 128.
_LARGEST_BLOCK = 2**16


@dataclass(frozen=True)
class Quantization:
    """Weights in fewer bits, with a scale for each block.

    method:        "fp8": matrices NAME in float8_e4m3fn, scales in NAME_scale_inv. "mxfp4": experts' matrices in 4
                   bits, two numbers in a byte of NAME_blocks, and powers of two as scales in NAME_scales.
    rows, columns: of a block.
    """

    method: str
    rows: int
    columns: int


def read_quantization(config: Mapping[str, Any]) -> Quantization | None:
    """How the weights of a config are quantised; None where they are not.

    ValueError, which names the method, for one that is not read.
    """
    found = [key for key in QUANTIZATION_KEYS if config.get(key)]
    if not found:
        return None
    given = config[found[0]]
    if not isinstance(given, dict):
        raise ValueError(f"config.json: expected {found[0]} to be an object, got {shown(given)}")
    if given.get("quant_method") == "mxfp4":
        return Quantization("mxfp4", 1, 32)
    if given.get("quant_method") != "fp8" or given.get("weight_block_size") is None:
        method = shown(given.get("quant_method"))
        detail = " without weight_block_size" if method == "'fp8'" else ""
        raise ValueError(
            f"config.json: expected unquantised weights, or {_READ}, got a {found[0]} of quant_method "
            f"{method}{detail}; load the model with its own library, dequantise it, save it in bfloat16 and remove "
            "that entry"
        )
    for key, known in (("fmt", ("e4m3", "float8_e4m3fn")), ("activation_scheme", ("dynamic",))):
        if given.get(key) is not None and given[key] not in known:
            raise ValueError(
                f"config.json: expected {key} of quantization_config to be {known[0]!r}, got {shown(given[key])}"
            )
    block = given["weight_block_size"]
    if not isinstance(block, list) or len(block) != 2 or not all(map(_is_size, block)):
        raise ValueError(
            f"config.json: expected weight_block_size to be rows and columns of a block, got {shown(block)}"
        )
    return Quantization("fp8", *block)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_BLOCK
