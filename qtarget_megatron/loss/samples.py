"""Which tokens belong to one sample, and the mean over a sample's tokens of what an objective asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qtarget_megatron import collectives


@dataclass(frozen=True)
class Samples:
    """The samples of a call's tokens.

    ids:   int64 ``[...]`` like the labels, 0 to count - 1: the sample of each token; whatever is in that range where a
           token is not supervised.
    count: how many there may be, on every rank of the group.
    group: ranks that have other tokens of the same samples, as under context parallelism; None: all are here.

    The same on every tensor-parallel rank. ValueError for ids that are not int64, a count below 1 and, on the CPU, ids
    outside of it.
    """

    ids: Tensor
    count: int
    group: collectives.Group = None

    def __post_init__(self) -> None:
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
        return Samples(self.ids.reshape(-1)[rows], self.count, self.group)

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
