"""Quantised tensors of a checkpoint as the bfloat16 tensors that they stand for, dequantised slice by slice."""

from __future__ import annotations

import itertools
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

_SCALE_DTYPES = (torch.float32, torch.bfloat16)
# The numbers of 4 bits: a sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Rows of 4 bits that are dequantised at once.
_ROWS = 1024


@dataclass(frozen=True)
class Float8Blocks:
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


@dataclass(frozen=True)
class Float4Experts:
    """Matrices of all E experts of a layer in mxfp4: transposed, each 32 numbers of a row with a scale.

        w[e, i, j] = bfloat16(fp4(blocks[e, j, i // 32, i % 32 // 2]) * 2^(scales[e, j, i // 32] - 127))

    fp4: of the lower four bits of the byte where i is even, of the upper ones where it is odd.
    parts: the names of blocks, uint8 [E, J, I / 32, 16], and scales, uint8 [E, J, I / 32].
    shape: [E, I, J].
    """

    parts: tuple[str, str]
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16

    def read(self, part: Slice, ranges: Sequence[Range]) -> Tensor:
        """These ranges of the three dimensions. Some rows of an expert are in memory beside them, in float32."""
        experts, (low, high), (first, last) = ranges
        found = torch.empty([end - begin for begin, end in ranges], dtype=self.dtype)
        table = torch.tensor([*_FP4, *(-value for value in _FP4)])
        pairs = torch.stack([table.repeat(16), table.repeat_interleave(16)], 1)  # of each byte
        of_blocks = (low // 32, _blocks(high, 32))
        for expert, row in itertools.product(range(*experts), range(first, last, _ROWS)):
            where = [(expert, expert + 1), (row, min(row + _ROWS, last)), of_blocks]
            packed = part(self.parts[0], [*where, (0, 16)])[0]
            exponents = part(self.parts[1], where)[0].int() - 127
            scales = torch.ldexp(torch.ones(exponents.shape), exponents)
            numbers = pairs.index_select(0, packed.flatten().int()).view(*scales.shape, 32)
            numbers = numbers.mul_(scales[..., None]).flatten(1)
            begin = low - 32 * of_blocks[0]
            rows = slice(row - first, row - first + len(numbers))
            found[expert - experts[0], :, rows] = numbers[:, begin : begin + high - low].T
        return found


Quantized = Float8Blocks | Float4Experts


def _blocks(size: int, of: int) -> int:
    return math.ceil(size / of)


def find_quantized(entries: Mapping[str, TensorEntry], how: Quantization | None) -> dict[str, Quantized]:
    """The quantised tensors among these, by name: those with a tensor of scales beside them.

    ValueError where a tensor of scales does not fit.
    """
    if how is None:
        return {}
    found: dict[str, Quantized] = {}
    for name, entry in entries.items():
        if how.method == "fp8" and entry.dtype == torch.float8_e4m3fn and f"{name}_scale_inv" in entries:
            found[name] = _float8(name, entry, entries[f"{name}_scale_inv"], (how.rows, how.columns))
        plain = name.removesuffix("_blocks")
        if how.method == "mxfp4" and plain != name and f"{plain}_scales" in entries:
            if plain in entries:
                raise ValueError(f"expected either {plain} or {name}, got both: remove the stale one")
            found[plain] = _float4(plain, entry, entries[f"{plain}_scales"])
    return found


def _float8(name: str, values: TensorEntry, scales: TensorEntry, block: tuple[int, int]) -> Float8Blocks:
    expected = tuple(map(_blocks, values.shape, block))
    if len(values.shape) != 2 or scales.shape != expected or scales.dtype not in _SCALE_DTYPES:
        raise ValueError(
            f"expected {name}_scale_inv as float32 or bfloat16 {list(expected)}, a scale for each block of "
            f"{list(block)} of the matrix {list(values.shape)}, got {scales.dtype} {list(scales.shape)}"
        )
    return Float8Blocks((name, f"{name}_scale_inv"), values.shape, block)


def _float4(name: str, blocks: TensorEntry, scales: TensorEntry) -> Float4Experts:
    fits = len(blocks.shape) == 4 and blocks.shape[3] == 16 and scales.shape == blocks.shape[:3]
    if not fits or (blocks.dtype, scales.dtype) != (torch.uint8, torch.uint8):
        raise ValueError(
            f"expected {name}_blocks as uint8 [experts, rows, blocks, 16], and {name}_scales with one for each block, "
            f"got {blocks.dtype} {list(blocks.shape)} and {scales.dtype} {list(scales.shape)}"
        )
    experts, rows, count, _ = blocks.shape
    return Float4Experts((f"{name}_blocks", f"{name}_scales"), (experts, 32 * count, rows))
