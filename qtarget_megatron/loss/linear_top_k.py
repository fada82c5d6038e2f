"""The most likely tokens under an output layer whose vocabulary is sharded, from hidden states, logits of a chunk of
tokens at a time: each rank's largest logits and its statistics, one all-gather of each, the largest of all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron import collectives, kernels
from qtarget_megatron.loss.per_token import CHUNK_SIZE, merge, true_vocab_size
from qtarget_megatron.statistics import StatisticsRequest, VocabularyShard

# Bits of a key that hold the id.
_ID_BITS = 24
_MAX_ID = (1 << _ID_BITS) - 1
# Sort key of an empty slot: below the key of every real token.
_NO_KEY = torch.iinfo(torch.int64).min


@dataclass
class TopTokens:
    """The k most likely tokens of n distributions, first ones first; equal logits by lower id.

    ids:    int64 [n, k].
    log_p:  float64 [n, k], in nats.
    counts: int64 [n], how many are kept.
    tail:   float64 [n], 1 minus the mass of these, at least 0; both come from float32 logits, so that a tail below 1e-6
            is rounding.
    """

    ids: Tensor
    log_p: Tensor
    counts: Tensor
    tail: Tensor


@torch.no_grad()
def linear_top_k(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    *,
    top_p: float | None = None,
    group: collectives.Group = None,
    vocab_size: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    backend: str = "auto",
) -> TopTokens:
    """The most likely tokens under softmax(hidden @ weight^T).

    Args:
        hidden: ``[n, H]`` float32, bfloat16 or float16, the same on every rank.
        weight: ``[V_local, H]``, dtype of hidden: this rank's rows of the output layer.
        k: tokens of each distribution, at most vocab_size.
        top_p: keep only the smallest set whose mass reaches this, at most k.
        group: tensor-parallel process group; None where the vocabulary is not sharded.
        vocab_size: columns from it on have no mass. Default: all; at most 2^24.
        chunk_size: tokens whose logits exist at a time.
        backend: of the statistics, as in qtarget_cross_entropy.

    A distribution with a NaN or +inf logit has NaN in log_p and tail. Bitwise the same on every rank. Collectives over
    group: an all-gather of 16 bytes and one of 8 k bytes per token and rank.

    Raises ValueError for a k or a vocab_size that cannot be.
    """
    rank, local_vocab = collectives.rank(group), weight.shape[0]
    vocab_size = true_vocab_size(vocab_size, local_vocab, collectives.size(group))
    if vocab_size > _MAX_ID + 1:
        raise ValueError(f"vocab_size: expected at most {_MAX_ID + 1}, got {vocab_size}")
    if not 0 < k <= vocab_size:
        raise ValueError(f"k: expected 1 to {vocab_size}, the vocabulary's size, got {k}")
    # Statistics are of supervised tokens: any label will do.
    labels, request = torch.zeros(len(hidden), dtype=torch.int64, device=hidden.device), StatisticsRequest()
    shard = VocabularyShard.of_rank(rank, local_vocab, vocab_size)
    kernel = kernels.select(backend, hidden)
    partials = torch.empty(len(hidden), request.width, device=hidden.device)
    keys = torch.full((len(hidden), k), _NO_KEY, device=hidden.device)
    for start in range(0, len(hidden), chunk_size):
        chunk = slice(start, start + chunk_size)
        logits = hidden[chunk] @ weight.t()
        partials[chunk] = kernel.partial_statistics(logits, None, labels[chunk], request=request, shard=shard)
        values, ids = _largest(logits[:, : shard.valid_columns], k)
        keys[chunk, : ids.shape[1]] = _packed(values, ids + shard.start)
    statistics = merge(kernel, collectives.gather_partials(partials, group), labels == 0, request)
    keys = collectives.gather_partials(keys, group).transpose(0, 1).flatten(1)
    values, ids = _unpacked(keys.topk(k, dim=-1).values)
    log_p = (values.double() - statistics.max[:, None]) - statistics.sum_exp.log()[:, None]

    mass = log_p.exp().cumsum(-1)
    counts = torch.full_like(ids[:, 0], k)
    if top_p is not None:
        # A token is kept where those before it do not reach top_p.
        counts = 1 + (mass[:, :-1] < top_p).sum(-1)
    tail = 1 - mass.gather(1, counts[:, None] - 1).squeeze(1)
    return TopTokens(ids, log_p, counts, tail.clamp(min=0))


def _largest(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row (all, where there are fewer) and their columns, of equal ones the first."""
    values, columns = logits.topk(min(k, logits.shape[1]), dim=-1)
    if values.shape[1] == 0:
        return values, columns
    # topk takes any of the columns that equal the last value: put the first of them in these places.
    last = values[:, -1:]
    row, column = (logits == last).nonzero(as_tuple=True)
    begin = torch.searchsorted(row, torch.arange(len(logits), device=row.device))
    place = (values > last).sum(-1)[row] + torch.arange(len(row), device=row.device) - begin[row]
    fits = place < values.shape[1]
    columns[row[fits], place[fits]] = column[fits]
    return values, columns


def _packed(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys in the order of the float32 values, of equal ones the lower id first (larger)."""
    # + 0: there are two zeros.
    bits = (values.float() + 0.0).view(torch.int32).long()
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered << _ID_BITS) | (_MAX_ID - ids)


def _unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = keys >> _ID_BITS
    bits = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered)
    return bits.int().view(torch.float32), _MAX_ID - (keys & _MAX_ID)
