"""Communication of tensor-parallel layers along the first dimension, with gradients; names that Megatron imports."""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist


def divide(size: int, parts: int) -> int:
    if size % parts:
        raise ValueError(f"{size} is not divisible by {parts}")
    return size // parts


def set_tensor_model_parallel_attributes(tensor: torch.Tensor, is_parallel: bool, dim: int, stride: int) -> None:
    """The marks from which Megatron knows which parameters are sharded. A tensor may be marked once."""
    for name, value in dict(tensor_model_parallel=is_parallel, partition_dim=dim, partition_stride=stride).items():
        if hasattr(tensor, name):
            raise RuntimeError(f"the tensor has the attribute {name} already")
        setattr(tensor, name, value)


def _gathered(shard: torch.Tensor, group) -> torch.Tensor:
    whole = shard.new_empty(shard.shape[0] * dist.get_world_size(group), *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group)
    return whole


def _summed(tensor: torch.Tensor, group) -> torch.Tensor:
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(tensor, group=group)
    return tensor


def _scattered_sum(whole: torch.Tensor, group) -> torch.Tensor:
    shard = whole.new_empty(divide(whole.shape[0], dist.get_world_size(group)), *whole.shape[1:])
    dist.reduce_scatter_tensor(shard, whole.contiguous(), group=group)
    return shard


class Copy(torch.autograd.Function):
    """The same input on all ranks, each of which has a part of its gradient."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return _summed(gradient, ctx.group), None


class AllReduce(torch.autograd.Function):
    """The sum over the ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


class AllGather(torch.autograd.Function):
    """The ranks' parts one after another; each rank has a part of the gradient of all of them."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _gathered(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return _scattered_sum(gradient, ctx.group), None


class ReduceScatter(torch.autograd.Function):
    """This rank's part of the sum over the ranks."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return _scattered_sum(tensor, group)

    @staticmethod
    def backward(ctx, gradient):
        return _gathered(gradient, ctx.group), None


class CudaRNGStatesTracker:
    """Megatron derives a tracker from it, which it uses under --te-rng-tracker only."""

    def __init__(self):
        raise NotImplementedError("the stand-in for Transformer Engine has no tracker of random states")


def checkpoint(*args, **kwargs):
    raise NotImplementedError("the stand-in for Transformer Engine has no recomputation of its own")


def activation_recompute_forward(*args, **kwargs):
    return contextlib.nullcontext()
