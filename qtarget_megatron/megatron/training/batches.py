"""Micro-batches from Megatron's data iterators, and what the routers of a training step have to know of all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX
from qtarget_megatron.data.side_inputs import batch_key
from qtarget_megatron.megatron.model.router import Router
from qtarget_megatron.objectives import Objective

_OF_EVERY_STAGE = {"tokens", "labels", "position_ids", "padding"}


class Batches:
    """Where the forward steps of this rank's model chunks get their micro-batches.

    Every rank that needs them reads them by sample index, so there is nothing to broadcast.
    """

    def __init__(self):
        # By the iterator of the chunk: its micro-batches that are read already, all of one step; its share.
        self._ahead: dict[int, deque] = {}
        self._shares: dict[int, Tensor] = {}

    def take(
        self,
        data_iterator: Iterator,
        model: torch.nn.Module,
        routers: Sequence[Router],
        objective: Objective,
        *,
        is_last: bool,
    ) -> dict[str, Tensor]:
        """The next micro-batch of this data-parallel rank, see on_this_rank. "sample" stays on the CPU; before the
        last stage side inputs and a cached teacher are left out.

        Where routers add to the loss of a training, a step's micro-batches are read at its first one: the step's
        number of supervised tokens, which is to divide all gradients, scales what they add. Collective, there alone:
        one all-reduce of 8 bytes over the data-parallel group.
        """

        def read() -> dict[str, Tensor]:
            batch = next_batch(data_iterator)
            counted = {batch_key(objective.denominator)} if objective.denominator is not None else set()
            return batch if is_last else {name: batch[name] for name in batch.keys() & (_OF_EVERY_STAGE | counted)}

        adding = [router for router in routers if router.training and router.has_loss] if model.training else []
        if not adding:
            return on_this_rank(read())
        chunk = id(data_iterator)
        ahead = self._ahead.setdefault(chunk, deque())
        if not ahead:
            ahead.extend([read() for _ in range(get_num_microbatches())])
            share = _supervised_share(ahead, objective)
            # Always the same memory, which a CUDA graph of a layer refers to. A chunk's last backward is over.
            share = self._shares.setdefault(chunk, torch.empty_like(share)).copy_(share)
            for router in adding:
                router.supervised_share = share
        return on_this_rank(ahead.popleft())


def next_batch(data_iterator: Iterator) -> dict[str, Tensor]:
    """What the loader has next; the watchdog knows by this name that a rank is reading its data."""
    return next(data_iterator)


def on_this_rank(read: dict[str, Tensor]) -> dict[str, Tensor]:
    """A micro-batch as the loader has it, on this rank's device and cut for context parallelism.

    "num_supervised" is added, [] on the CPU: of the labels, where the host knows it, which are not cut then.
    """
    batch = {key: value if key == "sample" else value.cuda(non_blocking=True) for key, value in read.items()}
    cp_group = parallel_state.get_context_parallel_group()
    if cp_group.size() > 1:
        per_token = {key: value for key, value in batch.items() if value.dim() > 1}
        batch |= get_batch_on_this_cp_rank(per_token, is_hybrid_cp=False, cp_group=cp_group)
    elif not read["labels"].is_cuda:
        batch["num_supervised"] = (read["labels"] != IGNORE_INDEX).sum()
    return batch


def _supervised_share(batches: Sequence[dict[str, Tensor]], objective: Objective) -> Tensor:
    """What gradients of this step are divided by, per micro-batch of the global batch; float32 [].

    objective: one whose denominator the data know, see arguments.check_balance.
    """
    counts = []
    for batch in batches:
        supervised = batch["labels"] != IGNORE_INDEX
        inputs = {name: batch[batch_key(name)] for name in [objective.denominator] if name is not None}
        # The last argument is the label mass, which is not asked for.
        counts.append(objective.num_tokens(supervised, inputs, supervised))
    total = torch.stack(counts).sum().to(torch.int64).cuda(non_blocking=True)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(total, group=group)
    return total.float() / (len(batches) * group.size())
