"""Which tokens belong to one sample, and means and sums over a sample's tokens of what an objective asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qtarget_megatron import collectives

# Sums of what comes after a token are of whole numbers of these: the same in any order, and all but exact.
_COARSE, _FINE = 2.0**-20, 2.0**-60
_LARGEST = 2.0**30
_NO_TOKEN = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Samples:
    """The samples of a call's tokens.

    ids:   int64 ``[...]`` like the labels, 0 to count - 1: the sample of each token; whatever is in that range where a
           token is not supervised.
    count: how many there may be, on every rank of the group.
    group: ranks that have other tokens of the same samples, as under context parallelism; None: all are here.
    order: int64 ``[...]`` like ids, 0 or more and below 2^31, larger where a token comes later in its sample; None: in
           the order in which they stand, of one rank.
    total: tokens of a call, supervised or not, the same on every rank of the group; None: as many as there are ids.

    The same on every tensor-parallel rank. ValueError for ids that are not int64, a count below 1 and, on the CPU, ids
    outside of it.
    """

    ids: Tensor
    count: int
    group: collectives.Group = None
    order: Tensor | None = None
    total: int | None = None

    def __post_init__(self) -> None:
        if self.order is not None and (self.order.dtype != torch.int64 or self.order.shape != self.ids.shape):
            raise ValueError(
                f"the order of samples' tokens is int64 {list(self.ids.shape)} like ids, got {self.order.dtype} "
                f"{list(self.order.shape)}"
            )
        if self.ids.dtype != torch.int64 or self.count < 1:
            raise ValueError(
                f"samples have int64 ids and a count of 1 or more, got {self.ids.dtype} and {self.count}: number them "
                "from 0"
            )
        if self.ids.device.type == "cpu" and self.ids.numel():
            low, high = (int(bound) for bound in self.ids.aminmax())
            if low < 0 or high >= self.count:
                raise ValueError(f"sample ids must be in 0..{self.count - 1}, got {low if low < 0 else high}")

    def check_fits(self, labels: Tensor) -> None:
        """ValueError unless they are of these tokens."""
        if self.ids.shape != labels.shape or self.ids.device != labels.device:
            raise ValueError(
                f"sample ids must be {list(labels.shape)} on {labels.device} like labels, got {list(self.ids.shape)} "
                f"on {self.ids.device}"
            )

    def rows(self, rows: Tensor | slice) -> Samples:
        """The samples of some of the tokens, flattened."""
        order = None if self.order is None else self.order.reshape(-1)[rows]
        total = self.ids.numel() if self.total is None else self.total
        return Samples(self.ids.reshape(-1)[rows], self.count, self.group, order, total)

    def map(self, function: Callable[[Tensor], Tensor]) -> Samples:
        """The same of ids and order as a function gives them."""
        return replace(self, ids=function(self.ids), order=None if self.order is None else function(self.order))

    def means(self, values: Tensor, supervised: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of values over the supervised tokens of each token's sample, and how many these are: float64 [N].

        values: float64 [N], whatever where not supervised. Both are 0 for a sample without a supervised token.

        Collectives: one all-gather of 16 bytes a sample over the group.
        """
        parts = torch.stack([values.masked_fill(~supervised, 0.0), supervised.to(values.dtype)], dim=-1)
        sums = values.new_zeros(self.count, 2)
        if sums.is_cuda:
            # Adds in the order of sorted indices; index_add_ would add in any.
            sums.index_put_((self.ids,), parts, accumulate=True)
        else:
            sums.index_add_(0, self.ids, parts)
        found = collectives.gather_partials(sums, self.group).sum(0)[self.ids]
        return found[:, 0] / found[:, 1].clamp_min(1), found[:, 1]

    def after(self, values: Tensor, supervised: Tensor, block: int = 1) -> tuple[Tensor, Tensor]:
        """The sum of values over the supervised tokens of each token's sample that come after its block, and how many
        these are: float64 [N], 0 where not supervised.

        values: float64 [N], rounded to 2^-60; one beyond 2^30 counts as NaN. block: a sample's supervised tokens, in
        order, fall into blocks of so many, the last of which may be shorter.

        Collectives: one all-gather of 24 bytes a token over the group. ValueError for a group of several without order.
        """
        alone = collectives.size(self.group) == 1
        if self.order is None and not alone:
            raise ValueError("samples of several ranks need the order of their tokens: pass order, as their positions")
        order = torch.arange(len(values), device=values.device) if self.order is None else self.order
        own = torch.where(supervised, (self.ids << 32) | order, _NO_TOKEN)
        values = values.masked_fill(~supervised, 0.0)
        bad = ~(values.abs() <= _LARGEST)
        values = values.masked_fill(bad, 0.0)
        coarse = (values / _COARSE).round()
        fine = ((values - coarse * _COARSE) / _FINE).round()
        travels = torch.stack([own, coarse.long() << 1 | bad, fine.long()], dim=-1)
        if not alone:
            rest = (self.total or 0) - len(values)
            travels = torch.nn.functional.pad(travels, (0, 0, 0, rest), value=_NO_TOKEN)
            travels = collectives.gather_partials(travels, self.group).flatten(0, 1)
        keys, places = travels[:, 0].sort()
        coarse, fine = travels[places, 1:].masked_fill((keys == _NO_TOKEN)[:, None], 0).unbind(1)
        sums = torch.nn.functional.pad(torch.stack([coarse >> 1, fine, coarse & 1]).cumsum(1), (1, 0))
        sample = torch.where(supervised, self.ids, 0)
        begin, end = (torch.searchsorted(keys, key << 32) for key in (sample, sample + 1))
        behind = torch.searchsorted(keys, own) - begin
        begin = torch.minimum(begin + (behind // block + 1) * block, end).where(supervised, end)
        coarse, fine, bad = sums[:, end] - sums[:, begin]
        after = (coarse.double() * _COARSE + fine.double() * _FINE).masked_fill(bad != 0, torch.nan)
        count = (end - begin).masked_fill(~supervised, 0)
        return after.masked_fill(~supervised, 0.0), count.double()
