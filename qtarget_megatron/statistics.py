"""Per-token statistics of a sharded softmax, and their merge over tensor-parallel ranks.

Each rank reduces its vocabulary shard to a few numbers per token (a *partial*); the partials of all ranks are
gathered once and merged here, in float64 and in rank order, so that every rank ends with bitwise the same numbers.

Layout of a partial, float32 ``[N, partial_width(R)]``, for R residuals ``r = softmax(u)``, ``u = a*z + b*t``::

    0            m    max z                      4 + 4i   m_u   max u
    1            s    sum exp(z - m)             5 + 4i   s_u   sum exp(u - m_u)
    2            e    sum exp(z - m) (z - m)     6 + 4i   x_u   sum exp(u - m_u) (z - m)
    3            z_y  label logit, 0 elsewhere   7 + 4i   h_u   sum exp(u - m_u) (u - m_u)

The weighted sums are centred on the local maximum: uncentred float32 sums lose the entropy at large logit offsets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BASE_WIDTH = 4
RESIDUAL_WIDTH = 4
MAX_RESIDUALS = 2

Residuals = tuple[tuple[float, float], ...]


def partial_width(num_residuals: int) -> int:
    """Numbers per token and rank that travel in the one collective (float32 each)."""
    return BASE_WIDTH + RESIDUAL_WIDTH * num_residuals


@dataclass
class ResidualStatistics:
    """Statistics of one residual ``r = softmax(a*z + b*t)`` over the whole vocabulary; every tensor is [N].

    max, sum_exp: of u = a*z + b*t, so that lse = max + log(sum_exp).
    mean_logit:   sum_k r_k z_k, the student logit averaged under r.
    entropy:      -sum_k r_k log r_k, in nats.
    """

    max: Tensor
    sum_exp: Tensor
    mean_logit: Tensor
    entropy: Tensor

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum_exp.log()


@dataclass
class TokenStatistics:
    """Statistics of every token over the whole vocabulary; every tensor is [N] float64.

    Where not supervised all are 0, but sum_exp is 1 so that lse is 0.

    supervised:    True where the label is not ignore_index.
    max, sum_exp:  of the student logits z, so that lse = max + log(sum_exp).
    log_p, p:      log p(y) and p(y) of the label.
    entropy:       -sum_k p_k log p_k, in nats.
    residuals:     one ResidualStatistics for each residual of the objective.

    Set once the objective has been evaluated:

    label_mass:     c_y.
    residual_mass:  sum of c_r over the residuals.
    trust:          c_y / (c_y + c_r), NaN where the total mass is 0.
    """

    supervised: Tensor
    max: Tensor
    sum_exp: Tensor
    log_p: Tensor
    p: Tensor
    entropy: Tensor
    residuals: tuple[ResidualStatistics, ...] = ()
    label_mass: Tensor | None = None
    residual_mass: Tensor | None = None
    trust: Tensor | None = None

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum_exp.log()

    @property
    def total_mass(self) -> Tensor:
        """M = c_y + c_r, the scale of the objective at this token."""
        return self.label_mass + self.residual_mass

    def cross_entropy(self, residual: int = 0) -> Tensor:
        """CE(r, p) = -sum_k r_k log p_k, in nats."""
        return self.lse - self.residuals[residual].mean_logit

    def kl_divergence(self, residual: int = 0) -> Tensor:
        """KL(r || p) = sum_k r_k (log r_k - log p_k), in nats."""
        return self.cross_entropy(residual) - self.residuals[residual].entropy

    def weighted_nll(self, weight: Tensor) -> Tensor:
        """-weight log p(y), and exactly 0 where the weight is 0 (0 * inf is no loss)."""
        return torch.where(weight == 0, torch.zeros_like(self.log_p), -weight * self.log_p)


def merge(partials: Tensor, supervised: Tensor, num_residuals: int) -> TokenStatistics:
    """Merge the partials of all ranks into statistics over the whole vocabulary.

    Args:
        partials: ``[T, N, partial_width(R)]``, one slice per tensor-parallel rank, in rank order.
        supervised: ``[N]`` bool; statistics of the other tokens are 0.
        num_residuals: R.

    A shard without any finite column has m = -inf and contributes nothing. A NaN anywhere stays NaN.
    """
    # One layout for every rank and every device: the sums below run over dim 0 in rank order.
    columns = partials.double().unbind(-1)
    m, s, e, z_y = columns[:BASE_WIDTH]
    keep = _masker(supervised)

    shift = _Shift(m)
    sum_exp = shift.total(s)
    # e is centred on the local maximum; centre it on the global one.
    centred = shift.total(e + shift.offset * s)
    log_sum = sum_exp.log()
    # Subtracting the maximum first keeps the precision of the label logit at large offsets.
    log_p = (z_y.sum(0) - shift.max) - log_sum

    residuals = []
    for index in range(num_residuals):
        start = BASE_WIDTH + RESIDUAL_WIDTH * index
        m_u, s_u, x_u, h_u = columns[start : start + RESIDUAL_WIDTH]
        shift_u = _Shift(m_u)
        sum_exp_u = shift_u.total(s_u)
        # A shard whose logits are all -inf but which carries residual mass makes the mean -inf, as it should.
        z_offset = torch.where(s_u == 0, torch.zeros_like(m), m - shift.max)
        mean_logit = shift_u.total(x_u + z_offset * s_u) / sum_exp_u + shift.max
        entropy_u = sum_exp_u.log() - shift_u.total(h_u + shift_u.offset * s_u) / sum_exp_u
        residuals.append(ResidualStatistics(keep(shift_u.max), keep(sum_exp_u, 1.0), keep(mean_logit), keep(entropy_u)))

    return TokenStatistics(
        supervised=supervised,
        max=keep(shift.max),
        sum_exp=keep(sum_exp, 1.0),
        log_p=keep(log_p),
        p=keep(log_p.exp()),
        entropy=keep(log_sum - centred / sum_exp),
        residuals=tuple(residuals),
    )


class _Shift:
    """Moves sums centred on each rank's maximum to the global maximum."""

    def __init__(self, local_max: Tensor):
        empty = local_max == -torch.inf
        self.max = local_max.amax(0)
        self.offset = torch.where(empty, torch.zeros_like(local_max), local_max - self.max)
        self._factor = torch.where(empty, torch.zeros_like(local_max), self.offset.exp())

    def total(self, local_sum: Tensor) -> Tensor:
        scaled = local_sum * self._factor
        # factor 0 belongs to an empty shard or to one that underflows; its -inf mean logit must not turn into NaN,
        # while a NaN has to survive.
        scaled = torch.where((self._factor == 0) & ~local_sum.isnan(), torch.zeros_like(scaled), scaled)
        return scaled.sum(0)


def _masker(supervised: Tensor):
    def keep(value: Tensor, otherwise: float = 0.0) -> Tensor:
        return torch.where(supervised, value, torch.full_like(value, otherwise))

    return keep
