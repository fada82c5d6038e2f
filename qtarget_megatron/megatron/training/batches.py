"""Micro-batches from Megatron's data iterators, and what the routers of a training step have to know of all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank, get_model_config
from torch import Tensor

from qtarget_megatron.data import IGNORE_INDEX, Batch
from qtarget_megatron.megatron.model.context_parallel import own_tokens
from qtarget_megatron.megatron.model.router import Router
from qtarget_megatron.objectives import Objective


class Batches:
    """Where the forward steps of this rank's model chunks get their micro-batches.

    Every rank that needs them reads them by sample index, so there is nothing to broadcast.
    """

    def __init__(self):
        # By the iterator of the chunk: its micro-batches that are read already, all of one step; its share.
        self._ahead: dict[int, deque[Batch]] = {}
        self._shares: dict[int, Tensor] = {}

    def take(
        self,
        data_iterator: Iterator,
        model: torch.nn.Module,
        routers: Sequence[Router],
        objective: Objective,
        *,
        is_last: bool,
    ) -> OwnBatch:
        """The next micro-batch of this data-parallel rank, see on_this_rank; before the last stage without what only
        the loss reads.

        Where routers add to the loss of a training, a step's micro-batches are read at its first one: the step's
        number of supervised tokens, which is to divide all gradients, scales what they add. Collective, there alone:
        one all-reduce of 8 bytes over the data-parallel group.
        """

        further = get_model_config(model).mtp_num_layers or 0

        def read() -> Batch:
            batch = Batch.of(next_batch(data_iterator))
            if is_last:
                return batch.with_segments() if objective.needs_samples else batch
            counted = {name: value for name, value in batch.inputs.items() if name == objective.denominator}
            return replace(batch, sample=None, inputs=counted, teacher=None)

        adding = [router for router in routers if router.training and router.has_loss] if model.training else []
        if not adding:
            return on_this_rank(read(), further)
        chunk = id(data_iterator)
        ahead = self._ahead.setdefault(chunk, deque())
        if not ahead:
            ahead.extend([read() for _ in range(get_num_microbatches())])
            share = _supervised_share(ahead, objective)
            # Always the same memory, which a CUDA graph of a layer refers to. A chunk's last backward is over.
            share = self._shares.setdefault(chunk, torch.empty_like(share)).copy_(share)
            for router in adding:
                router.supervised_share = share
        return on_this_rank(ahead.popleft(), further)


def next_batch(data_iterator: Iterator) -> dict[str, Tensor]:
    """What the loader has next; the watchdog knows by this name that a rank is reading its data."""
    return next(data_iterator)


@dataclass(frozen=True)
class OwnBatch:
    """What this rank reads of a micro-batch. packed: where the samples of packed rows lie, for every stage's layers."""

    batch: Batch
    packed: PackedSeqParams | None = None


def on_this_rank(read: Batch, further: int = 0) -> OwnBatch:
    """A micro-batch as the loader has it, on this rank's device and cut for context parallelism; with the number of
    supervised tokens where the host knows it and the labels are not cut.

    further: heads of multi-token prediction, each of which predicts a token more ahead. Packed rows stand one behind
    another, [1, b s].
    """
    cp_group = parallel_state.get_context_parallel_group()
    packed = None
    if read.packed:
        edges, rows = _edges(read.position_ids), len(read.tokens)
        own = own_tokens(edges, cp_group.rank(), cp_group.size()) if cp_group.size() > 1 else slice(None)
        read = read.map(lambda tensor: tensor if tensor.dim() == 1 else tensor.flatten(0, 1)[None, own])
        packed = _packed_seq_params(edges, rows)
    batch = read.map(lambda tensor: tensor.cuda(non_blocking=True))
    if cp_group.size() == 1:
        if not read.labels.is_cuda:
            batch = replace(batch, num_supervised=_supervised(read, further))
    elif packed is None:

        def cut(tensor: Tensor) -> Tensor:
            if tensor.dim() == 1:  # of samples, not of tokens
                return tensor
            return get_batch_on_this_cp_rank({"part": tensor}, is_hybrid_cp=False, cp_group=cp_group)["part"]

        batch = batch.map(cut)
    return OwnBatch(batch, packed)


def _supervised(read: Batch, further: int) -> tuple[int, ...]:
    """How many labels are supervised, and how many of them have 1, 2, ... tokens of their sample before them."""
    supervised = read.labels != IGNORE_INDEX
    return tuple(int((supervised & (read.position_ids >= ahead)).sum()) for ahead in range(further + 1))


def _edges(position_ids: Tensor) -> list[tuple[int, int]]:
    """Begin and end of each sample, and of the rest of a row, in rows [b, s] one behind another."""
    flat = position_ids.flatten()
    begins = (flat == 0).nonzero().squeeze(1).tolist()
    return list(zip(begins, [*begins[1:], len(flat)], strict=True))


def _packed_seq_params(edges: list[tuple[int, int]], rows: int) -> PackedSeqParams:
    ends = torch.tensor([0, *(end for _, end in edges)], dtype=torch.int32).cuda(non_blocking=True)
    longest = max(end - begin for begin, end in edges)
    packed = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    # What the layers here would have to wait for the device for.
    packed.host_edges, packed.rows = edges, rows
    return packed


def _supervised_share(batches: Sequence[Batch], objective: Objective) -> Tensor:
    """What gradients of this step are divided by, per micro-batch of the global batch; float32 [].

    objective: one whose denominator the data know, see arguments.check_balance.
    """
    counts = []
    for batch in batches:
        supervised = batch.labels != IGNORE_INDEX
        # The last argument is the label mass, which is not asked for.
        counts.append(objective.num_tokens(supervised, batch.inputs, supervised))
    total = torch.stack(counts).sum().to(torch.int64).cuda(non_blocking=True)
    group = parallel_state.get_data_parallel_group()
    dist.all_reduce(total, group=group)
    return total.float() / (len(batches) * group.size())
