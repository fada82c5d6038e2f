"""The collectives of the losses, all over the tensor-parallel group; a group of None or of one rank needs none."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

# The tensor-parallel process group; None where the vocabulary is not sharded.
Group = dist.ProcessGroup | None
# torch 2.13 gives them other names, and warns of the old ones.
_GATHER_INTO = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_REDUCE_INTO = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"


def size(group: Group) -> int:
    return 1 if group is None else dist.get_world_size(group)


def rank(group: Group) -> int:
    return 0 if group is None else dist.get_rank(group)


def gather_partials(partials: Tensor, group: Group) -> Tensor:
    """[N, K] on every rank -> [T, N, K] in rank order: one all-gather."""
    return partials[None] if size(group) == 1 else _all_gather(partials, group).view(size(group), *partials.shape)


def gather_sequence(shard: Tensor, group: Group) -> Tensor:
    """[s/T, ...] on every rank -> [s, ...]: one all-gather along the first dimension."""
    return shard if size(group) == 1 else _all_gather(shard, group)


def scatter_sequence_sum(partial: Tensor, group: Group) -> Tensor:
    """[s, ...] on every rank -> this rank's [s/T, ...] of the sum over ranks: one reduce-scatter."""
    if size(group) == 1:
        return partial
    shard = partial.new_empty(partial.shape[0] // size(group), *partial.shape[1:])
    getattr(dist, _REDUCE_INTO)(shard, partial.contiguous(), group=group)
    return shard


def sum_in_place(partial: Tensor, group: Group) -> Tensor:
    """The sum over ranks, in the same tensor: one all-reduce."""
    if size(group) > 1:
        dist.all_reduce(partial, group=group)
    return partial


def _all_gather(shard: Tensor, group: Group) -> Tensor:
    gathered = shard.new_empty(size(group) * shard.shape[0], *shard.shape[1:])
    getattr(dist, _GATHER_INTO)(gathered, shard.contiguous(), group=group)
    return gathered
