"""A sum over the bits of a tensor's elements, taken as integers, that is the same in any order and any shards:

    h = sum_i bits(x_i) w(i) mod 2^64,    w(i) odd,

where i is the element's place along a dimension that tensor parallelism leaves whole. Sums of integers are exact, and
one flipped bit always changes h, as w is odd.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 20  # elements whose bits are widened at a time
_LARGEST = 1 << 63


def bit_sum(values: Tensor, start: int, shape: Sequence[int], cut: int | None) -> Tensor:
    """The sum of bits of consecutive elements of a parameter, int64 [].

    values: [n], 2, 4 or 8 bytes each. start: place of the first one in the parameter of this shape, in C order.
    cut: the dimension along which tensor parallelism cuts it, None for none: elements are weighted by their place along
    the other one.
    """
    bits = values.contiguous().view(INTEGERS[values.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=values.device)
    if len(shape) == 1 and cut is not None:
        return total + sum(part.sum(dtype=torch.int64) for part in bits.split(_CHUNK))
    width = shape[-1]
    position = start
    while len(bits):
        column = position % width
        rows = max(_CHUNK // width, 1) if column == 0 else 0
        rows = min(rows, len(bits) // width)
        # Whole rows, or what completes one.
        length = rows * width if rows else min(width - column, len(bits), _CHUNK)
        block = bits[:length].view(max(rows, 1), -1)
        if cut == len(shape) - 1 and len(shape) > 1:
            sums, places = block.sum(1, dtype=torch.int64), torch.arange(len(block), device=bits.device)
            places += position // width
        else:
            sums, places = block.sum(0, dtype=torch.int64), torch.arange(block.shape[1], device=bits.device)
            places += column
        total += (sums * _odd(places)).sum()
        position += length
        bits = bits[length:]
    return total


def _odd(places: Tensor) -> Tensor:
    """An odd number of 64 bits for each place; neighbours have very different ones."""
    return (places + 1) * -0x61C8864680B583EB | 1


def wrapped(number: int) -> int:
    """As an int64 that overflows."""
    return (number + _LARGEST) % (2 * _LARGEST) - _LARGEST
