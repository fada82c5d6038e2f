"""One expert's parameters from tensors that hold those of all E experts of a layer, and back.

A checkpoint has [E, h, 2 f] and [E, 2 f] for the first linear layer, gate and up in turns in the last dimension, and
[E, f, h] and [E, h] for the second; Megatron has [2 f, h] and [2 f], all of gate before all of up, and [h, f] and [h].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qtarget_megatron.huggingface.weights.reader import HFReader

Range = tuple[int, int]


def gate_up_pieces(reader: HFReader, source: str, expert: int, share: Range) -> Iterator[Tensor]:
    """A share of the gate's rows, then of those of up."""
    begin, end = share
    where = {"rows": (expert, expert + 1), ("last" if len(reader.shape(source)) == 3 else "cols"): (2 * begin, 2 * end)}
    turns = reader.read(source, **where)[0]
    for part in (0, 1):
        yield turns[..., part::2].movedim(-1, 0).contiguous()


def down_pieces(reader: HFReader, source: str, expert: int, share: Range | None) -> Iterator[Tensor]:
    """A share of the columns, or the bias."""
    found = reader.read(source, rows=(expert, expert + 1), cols=share)[0]
    yield found.movedim(-1, 0).contiguous()


def gate_up_slab(shards: Sequence[Tensor]) -> Tensor:
    """[1, h, 2 f] or [1, 2 f] of the shards of one expert's parameter."""
    halves = [shard.chunk(2) for shard in shards]
    gate, up = (torch.cat([half[part] for half in halves]) for part in (0, 1))
    return torch.stack([gate, up], 1).flatten(0, 1).movedim(0, -1)[None]


def down_slab(shards: Sequence[Tensor]) -> Tensor:
    """[1, f, h] or [1, h] of the shards of one expert's parameter, the first one of a bias."""
    return (torch.cat(list(shards), 1) if shards[0].dim() > 1 else shards[0]).movedim(0, -1)[None]
