"""What crosses the tensor-parallel group per loss: our one all-gather and merge against Megatron's all-reduces."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from qtarget_megatron import collectives, kernels, objectives, qtarget_cross_entropy
from qtarget_megatron.loss.per_token import merge
from tools.benchmarking import peers
from tools.benchmarking.kernels import ETA

OURS, OURS_WITH_TEACHER = "one all-gather + merge (sft)", "one all-gather + merge (target-sft)"
THREE, TWO = "three all-reduces (Megatron)", "two all-reduces (Megatron, fused)"
WHOLE_OURS, WHOLE_MEGATRON = "whole loss, qtarget", "whole loss, Megatron"
# Columns of a rank's shard where a whole loss is timed: few, so that the collectives are what is seen.
COLUMNS = 16
_WARM_UP = 5


def measure(*, say: Callable[[str], None], tokens: list[int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of this rank for each number of tokens and method; a run starts when all ranks are there."""
    rows = []
    for number in tokens:
        subjects = _subjects(number)
        times: dict[str, list[float]] = {name: [] for name in subjects}
        for turn in range(_WARM_UP + rounds):
            for name, run in subjects.items():
                dist.barrier()
                started = time.perf_counter()
                run()
                elapsed = time.perf_counter() - started
                if turn >= _WARM_UP:
                    times[name].append(elapsed)
        say(f"{dist.get_world_size()} ranks, {number} tokens: {rounds} rounds of {len(subjects)} methods are done")
        rows += [{"tokens": number, "method": name, "seconds": taken} for name, taken in times.items()]
    return rows


def _subjects(tokens: int) -> dict[str, Callable[[], Any]]:
    group = dist.group.WORLD
    sft, target_sft = objectives.sft(), objectives.target_sft(eta=ETA)
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(COLUMNS * dist.get_world_size(), (tokens,), generator=generator)
    logits = torch.randn(tokens, COLUMNS, generator=generator)
    upstream = torch.ones(tokens)
    supervised = torch.ones(tokens, dtype=torch.bool)

    def gather(objective, partials: Tensor) -> None:
        merge(kernels.native, collectives.gather_partials(partials, group), supervised, objective.request)

    def reduce(numbers: list[Tensor]) -> None:
        first, *others = numbers
        dist.all_reduce(first, op=dist.ReduceOp.MAX, group=group)
        for tensor in others:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)

    def whole(loss_of: Callable[[Tensor], Tensor]) -> None:
        fresh = logits.clone().requires_grad_()
        torch.autograd.grad(loss_of(fresh), fresh, upstream)

    megatron = peers.megatron_cross_entropy(group)
    return {
        # Positive numbers, as sums of exponentials are.
        OURS: partial(gather, sft, torch.ones(tokens, sft.request.width)),
        OURS_WITH_TEACHER: partial(gather, target_sft, torch.ones(tokens, target_sft.request.width)),
        THREE: partial(reduce, [torch.zeros(tokens) for _ in range(3)]),
        TWO: partial(reduce, [torch.zeros(tokens), torch.zeros(2 * tokens)]),
        WHOLE_OURS: partial(
            whole, lambda z: qtarget_cross_entropy(z, labels, objective=sft, group=group, inplace=True)
        ),
        WHOLE_MEGATRON: partial(whole, lambda z: megatron(z, labels)),
    }
