"""Per-token statistics of a sharded softmax, and their merge over tensor-parallel ranks.

Each rank reduces its vocabulary shard to a few numbers per token (a *partial*); the partials of all ranks are
gathered once and merged here, in float64 and in rank order, so that every rank ends with bitwise the same numbers.

Layout of a partial, float32 ``[N, request.width]``::

    always                       m    max z
                                 s    sum exp(z - m)
                                 e    sum exp(z - m) (z - m)
                                 z_y  label logit, 0 where the label is on another shard
    collision                    c    sum exp(2 (z - m))
    top_k                             the k largest z, descending; -inf where the shard has fewer columns
    for each residual            m_u  max u, rounded              of u = a*z + b*t
                                 s_u  sum exp(u - m_u)
                                 x_u  sum exp(u - m_u) (z - m)
        residual_entropy         h_u  sum exp(u - m_u) (u - m_u)
        residual_label           t_y  label's t, 0 where the label is on another shard or b is 0

The weighted sums are centred on the local maximum: uncentred float32 sums lose the entropy at large logit offsets. So
are a residual's, on just the m_u that travels; u itself is never rounded, and a, b are kernel_coefficients().
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_RESIDUALS = 2
_BASE_WIDTH = 4
_RESIDUAL_WIDTH = 3

Residuals = tuple[tuple[float, float], ...]


@functools.lru_cache
def kernel_coefficients(residuals: Residuals, dtype: torch.dtype) -> Residuals:
    """(a, b) of each residual as a kernel reads them whose sums have this dtype, float32 or float64."""
    return tuple(tuple(torch.tensor(pair, dtype=dtype).tolist()) for pair in residuals)


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics are computed, and travel, besides those that every objective has.

    residuals:        (a, b) of each residual softmax(a*z + b*t), at most MAX_RESIDUALS.
    collision:        sum_k p_k^2.
    top_k:            this many of the largest logits (0: none).
    residual_entropy: the entropy of each residual, which KL(r || p) needs.
    residual_label:   log r(y) of each residual.
    """

    residuals: Residuals = ()
    collision: bool = False
    top_k: int = 0
    residual_entropy: bool = False
    residual_label: bool = False

    def __post_init__(self) -> None:
        if len(self.residuals) > MAX_RESIDUALS:
            raise ValueError(f"an objective has at most {MAX_RESIDUALS} residuals, got {len(self.residuals)}")
        for coefficients in self.residuals:
            if len(coefficients) != 2 or not all(math.isfinite(c) for c in coefficients):
                raise ValueError(f"a residual is a pair of finite numbers (a, b), got {coefficients!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of logits, 0 or more, got {self.top_k!r}")

    @property
    def residual_width(self) -> int:
        return _RESIDUAL_WIDTH + self.residual_entropy + self.residual_label

    @property
    def width(self) -> int:
        """Numbers per token and rank that travel in the one collective (float32 each)."""
        return _BASE_WIDTH + self.collision + self.top_k + self.residual_width * len(self.residuals)


@dataclass
class ResidualStatistics:
    """Statistics of one residual ``r = softmax(a*z + b*t)`` over the whole vocabulary; every tensor is [N].

    max, sum_exp: of u = a*z + b*t with the kernels' rounded a and b; sum_exp is centred on max.
    lse:          log sum_k exp(u_k). With one operand (a or b is 0) of the exact a and b: what rounding them moves u by
                  grows with the distance of the logits from 0.
    mean_logit:   sum_k r_k z_k, the student logit averaged under r.
    entropy:      -sum_k r_k log r_k, in nats; None unless requested (residual_entropy).
    log_p:        log r(y) of the label; None unless requested (residual_label).
    """

    max: Tensor
    sum_exp: Tensor
    lse: Tensor
    mean_logit: Tensor
    entropy: Tensor | None = None
    log_p: Tensor | None = None


@dataclass
class TokenStatistics:
    """Statistics of every token over the whole vocabulary; every tensor is [N] float64.

    Where not supervised all are 0, but sum_exp is 1 so that lse is 0.

    supervised:    True where the label is not ignore_index.
    max, sum_exp:  of the student logits z, so that lse = max + log(sum_exp).
    log_p, p:      log p(y) and p(y) of the label.
    entropy:       -sum_k p_k log p_k, in nats.
    collision:     sum_k p_k^2; None unless requested.
    top_logits:    the k largest logits, [N, k], descending, -inf where the vocabulary is smaller; None unless
                   requested.
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
    collision: Tensor | None = None
    top_logits: Tensor | None = None
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
        """KL(r || p) = sum_k r_k (log r_k - log p_k), in nats; the objective requests residual_entropy."""
        entropy = self.residuals[residual].entropy
        if entropy is None:
            raise ValueError("kl_divergence needs the residual's entropy: build Objective(..., residual_entropy=True)")
        return self.cross_entropy(residual) - entropy

    def weighted_nll(self, weight: Tensor) -> Tensor:
        """-weight log p(y), and exactly 0 where the weight is 0 (0 * inf is no loss)."""
        return (-weight * self.log_p).masked_fill(weight == 0, 0.0)

    def top_k_entropy(self) -> Tensor:
        """Entropy in nats of softmax over the k largest logits, k = top_k; the objective requests top_k."""
        if self.top_logits is None:
            raise ValueError("top_k_entropy needs the largest logits: build Objective(..., top_k=K)")
        log_q = torch.log_softmax(self.top_logits, -1)
        # A token that is not supervised has k equal logits: give it the entropy 0 of every other statistic.
        entropy = -torch.where(log_q == -torch.inf, torch.zeros_like(log_q), log_q.exp() * log_q).sum(-1)
        return torch.where(self.supervised, entropy, torch.zeros_like(entropy))


def merge(
    partials: Tensor, supervised: Tensor, request: StatisticsRequest, coefficients: Residuals | None = None
) -> TokenStatistics:
    """Merge the partials of all ranks into statistics over the whole vocabulary.

    Args:
        partials: ``[T, N, request.width]``, one slice per tensor-parallel rank, in rank order.
        supervised: ``[N]`` bool; the partials of the other tokens are 0, as the kernels write them, and so are their
            statistics.
        request: what the partials hold.
        coefficients: of the residuals as the kernels read them; by default those of the partials' dtype.

    A shard without any finite column has m = -inf and contributes nothing. A NaN anywhere stays NaN.
    """
    # One layout for every rank and every device: the sums below run over dim 0 in rank order. As few operations as
    # can be: on a GPU each is a launch.
    coefficients = coefficients or kernel_coefficients(request.residuals, partials.dtype)
    columns = iter(partials.double().unbind(-1))
    m, s, e, z_y = (next(columns) for _ in range(_BASE_WIDTH))
    ignored = ~supervised

    shift = _Shift(m)
    # e is centred on the local maximum; centre it on the global one.
    sum_exp, centred = shift.totals(s, shift.recentred(e, s))
    sum_exp = sum_exp.masked_fill(ignored, 1.0)
    log_sum = sum_exp.log()
    # Subtracting the maximum first keeps the precision of the label logit at large offsets.
    label_logit = _summed(z_y)
    log_p = (label_logit - shift.max) - log_sum

    collision = top_logits = None
    if request.collision:
        (collision,) = shift.totals(next(columns), power=2)
        collision = collision / sum_exp**2
    if request.top_k:
        of_all_ranks = torch.cat([next(columns).t() for _ in range(request.top_k)], dim=-1)
        top_logits = of_all_ranks.topk(request.top_k, dim=-1).values if len(partials) > 1 else of_all_ranks

    residuals = []
    for exact, rounded in zip(request.residuals, coefficients, strict=True):
        m_u, s_u, x_u = (next(columns) for _ in range(_RESIDUAL_WIDTH))
        shift_u = _Shift(m_u)
        sums = [s_u, x_u]
        if len(partials) > 1:
            # A shard whose logits are all -inf but which carries residual mass makes the mean -inf, as it should.
            sums[1] = x_u + (m - shift.max).masked_fill(s_u == 0, 0.0) * s_u
        if request.residual_entropy:
            sums.append(shift_u.recentred(next(columns), s_u))
        sum_exp_u, cross, *centred_u = shift_u.totals(*sums)
        sum_exp_u = sum_exp_u.masked_fill(ignored, 1.0)
        log_sum_u = sum_exp_u.log()
        entropy_u = log_r_y = None
        if request.residual_entropy:
            entropy_u = log_sum_u - centred_u[0] / sum_exp_u
        if request.residual_label:
            log_r_y = (_combined(rounded, label_logit, _summed(next(columns))) - shift_u.max) - log_sum_u
        lse_u = shift_u.max * _rounding(exact, rounded) + log_sum_u
        mean = cross / sum_exp_u + shift.max
        residuals.append(ResidualStatistics(shift_u.max, sum_exp_u, lse_u, mean, entropy_u, log_r_y))

    return TokenStatistics(
        supervised=supervised,
        max=shift.max,
        sum_exp=sum_exp,
        log_p=log_p,
        p=log_p.exp().masked_fill(ignored, 0.0),
        entropy=log_sum - centred / sum_exp,
        collision=collision,
        top_logits=top_logits,
        residuals=tuple(residuals),
    )


def _combined(coefficients: tuple[float, float], z: Tensor, t: Tensor) -> Tensor:
    """a z + b t; a coefficient of 0 removes its operand."""
    return sum((c * value for c, value in zip(coefficients, (z, t), strict=True) if c != 0), torch.zeros_like(z))


def _rounding(exact: tuple[float, float], rounded: tuple[float, float]) -> float:
    """What turns the maximum of u into that of the exact coefficients, where u has one operand."""
    operands = [(c, r) for c, r in zip(exact, rounded, strict=True) if r != 0]
    return operands[0][0] / operands[0][1] if len(operands) == 1 else 1.0


class _Shift:
    """Moves sums centred on each rank's maximum [T, N] to the global maximum [N]; of one rank they are there."""

    def __init__(self, local_max: Tensor):
        self._alone = len(local_max) == 1
        self.max = local_max[0] if self._alone else local_max.amax(0)
        if self._alone:
            return
        empty = local_max == -torch.inf
        self._offset = (local_max - self.max).masked_fill(empty, 0.0)
        self._factor = self._offset.exp().masked_fill(empty, 0.0)
        self._gone = self._factor == 0

    def recentred(self, local_sum: Tensor, weights: Tensor) -> Tensor:
        """sum_k w_k (z_k - m) of each rank, as a sum of w_k (z_k - global m); weights: sum_k w_k."""
        return local_sum if self._alone else local_sum + self._offset * weights

    def totals(self, *local_sums: Tensor, power: int = 1) -> tuple[Tensor, ...]:
        """Sums over ranks of sum_k exp(power (z_k - m)) terms, moved to the global maximum."""
        if self._alone:
            return tuple(local_sum[0] for local_sum in local_sums)
        sums = torch.stack(local_sums)
        scaled = sums * self._factor**power
        # factor 0 belongs to an empty shard or to one that underflows; its -inf mean logit must not turn into NaN,
        # while a NaN has to survive.
        return scaled.masked_fill(self._gone & (sums == sums), 0.0).sum(1).unbind()


def _summed(column: Tensor) -> Tensor:
    """Over the ranks, of which all but one have 0."""
    return column[0] if len(column) == 1 else column.sum(0)
