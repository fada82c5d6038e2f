"""Which tokens of a row a rank of context parallelism has: Megatron's cut, for whole rows and for packed ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Edges = Sequence[tuple[int, int]]


def own_tokens(edges: Edges, rank: int, ranks: int) -> Tensor:
    """Positions in a row of the tokens that a rank has, int64, in the order in which it has them.

    edges: begin and end of each sample. Each is cut into 2 C chunks, of which rank r has chunks r and 2 C - 1 - r.
    """
    parts = []
    for begin, end in edges:
        chunk = (end - begin) // (2 * ranks)
        for place in (rank, 2 * ranks - 1 - rank):
            parts.append(torch.arange(begin + place * chunk, begin + (place + 1) * chunk))
    return torch.cat(parts)


def places_in_order(edges: Edges, ranks: int) -> Tensor:
    """Where each token of a row stands in what all ranks have of it, one rank after another."""
    return torch.cat([own_tokens(edges, rank, ranks) for rank in range(ranks)]).argsort()
