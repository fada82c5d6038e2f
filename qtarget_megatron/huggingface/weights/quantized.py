"""Quantised tensors of a checkpoint as the bfloat16 tensors that they stand for, dequantised slice by slice."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron.huggingface.config.quantization import Quantization
from qtarget_megatron.huggingface.weights.header import TensorEntry

Range = tuple[int, int]
# Reads a part of a tensor as it is on the disk: its name, and a range of each dimension.
Slice = Callable[[str, Sequence[Range]], Tensor]

_SCALES = "_scale_inv"
_SCALE_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Quantized:
    """A matrix in float8_e4m3fn, with a scale for each block of R rows and C columns; blocks at the ends are smaller.

        w[i, j] = bfloat16(float32(values[i, j]) * float32(scales[i // R, j // C]))

    parts: the names of values and scales.
    block: (R, C).
    """

    parts: tuple[str, str]
    shape: tuple[int, ...]
    block: tuple[int, int]
    dtype: torch.dtype = torch.bfloat16

    def read(self, part: Slice, ranges: Sequence[Range]) -> Tensor:
        """These rows and columns. A row of blocks at a time is in memory beside them, as values and as products."""
        values, scales = self.parts
        (first, last), (left, right) = ranges
        height, width = self.block
        found = torch.empty(last - first, right - left, dtype=self.dtype)
        if not found.numel():
            return found
        of_blocks = (left // width, _blocks(right, width))
        column = torch.arange(left, right) // width - of_blocks[0]
        for row in range(first // height, _blocks(last, height)):
            begin, end = max(first, row * height), min(last, (row + 1) * height)
            scale = part(scales, [(row, row + 1), of_blocks]).float()
            product = part(values, [(begin, end), (left, right)]).float().mul_(scale[:, column])
            found[begin - first : end - first] = product
        return found


def _blocks(size: int, of: int) -> int:
    return math.ceil(size / of)


def find_quantized(entries: Mapping[str, TensorEntry], how: Quantization | None) -> dict[str, Quantized]:
    """The quantised tensors among these, by name: those with a tensor of scales beside them.

    ValueError where a tensor of scales does not fit.
    """
    if how is None:
        return {}
    block, found = (how.rows, how.columns), {}
    for name, values in entries.items():
        scales = entries.get(name + _SCALES)
        if scales is None or values.dtype != torch.float8_e4m3fn:
            continue
        expected = tuple(map(_blocks, values.shape, block))
        if len(values.shape) != 2 or scales.shape != expected or scales.dtype not in _SCALE_DTYPES:
            raise ValueError(
                f"expected {name}{_SCALES} as float32 or bfloat16 {list(expected)}, a scale for each block of "
                f"{list(block)} of the matrix {list(values.shape)}, got {scales.dtype} {list(scales.shape)}"
            )
        found[name] = Quantized((name, name + _SCALES), values.shape, block)
    return found
