"""Per-token statistics of a sharded softmax: those of a rank's shard, and those over the whole vocabulary.

Each rank reduces its vocabulary shard to a few numbers per token (a *partial*); the partials of all ranks are
gathered once and merged, in float64 and in rank order, so that every rank ends with bitwise the same numbers.

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
    reverse KL                   y    sum exp(z - m) (u - m_u), u of the first residual

The weighted sums are centred on the local maximum: uncentred float32 sums lose the entropy at large logit offsets. So
are a residual's, on just the m_u that travels; u itself is never rounded, and a, b are kernel_coefficients().

A divergence other than the reverse KL asks for sums over the log ratio of two probabilities, which is known with the
merged sums only: a second pass over the shard, and a second collective of two numbers per token.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self, overload

import torch
from torch import Tensor

# Label of a token without supervision, unless a caller says otherwise.
IGNORE_INDEX = -100
MAX_RESIDUALS = 2
_MERGED_BASE, _MERGED_RESIDUAL, _MERGED_DIVERGENCE = 5, 4, 2
_TOTALS = 3

Residuals = tuple[tuple[float, float], ...]


class VocabularyShard(NamedTuple):
    """The part of the vocabulary that a rank's logits are of, and the label of tokens without supervision.

    start:         token id of the first column.
    valid_columns: columns of the true vocabulary; those behind them are padding.
    ignore_index:  label of tokens without supervision.
    """

    start: int
    valid_columns: int
    ignore_index: int = IGNORE_INDEX

    @classmethod
    def of_rank(cls, rank: int, local_vocab: int, vocab_size: int, ignore_index: int = IGNORE_INDEX) -> Self:
        """The shard of a rank where each has local_vocab columns of a padded vocabulary.

        vocab_size: of the true vocabulary.
        """
        start = rank * local_vocab
        return cls(start, min(max(vocab_size - start, 0), local_vocab), ignore_index)


@functools.lru_cache
def kernel_coefficients(residuals: Residuals, dtype: torch.dtype) -> Residuals:
    """(a, b) of each residual as a kernel reads them whose sums have this dtype, float32 or float64."""
    if dtype == torch.float64:
        return residuals
    # Without a tensor: it would be made of whatever mode torch is in, and kept.
    return tuple((ctypes.c_float(a).value, ctypes.c_float(b).value) for a, b in residuals)


# In the order of the kernels' numbers, from 1.
DIVERGENCES = ("reverse-kl", "mixture", "total-variation")


@dataclass(frozen=True)
class Divergence:
    """A divergence of the model's distribution p from the first residual r, whose target depends on p at each token of
    the vocabulary by itself; everything of it is a function of l = log p - log r.

        D(p, r) = sum_k p_k A(l_k) + r_k B(l_k)        dD / dz_k = p_k (h(l_k) - sum_j p_j h(l_j))

    kind:                  "reverse-kl"       KL(p || r):  A = h = l, B = 0
                           "mixture"          of_residual KL(r || m) + of_model KL(p || m), m = share r + (1 - share) p
                           "total-variation"  1/2 sum_k |p_k - r_k|:  A = h = sign(l) / 2, B = -A
                           of a mixture h goes to 0 where p is all of m: rounding is then that of a small number
    share:                 of a mixture, in (0, 1).
    of_residual, of_model: of a mixture, the weights of its two terms, 0 or more.

    Build one with the class methods. ValueError for a value out of range.
    """

    kind: str
    share: float = 0.0
    of_residual: float = 0.0
    of_model: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            raise ValueError(f"a divergence is one of {', '.join(DIVERGENCES)}, got {self.kind!r}")
        if self.kind == "mixture" and not (
            0 < self.share < 1 and 0 <= self.of_residual < math.inf and 0 <= self.of_model < math.inf
        ):
            raise ValueError(
                "a mixture has a share in (0, 1) and weights of 0 or more, got "
                f"{self.share!r}, {self.of_residual!r} and {self.of_model!r}"
            )

    @classmethod
    def reverse_kl(cls) -> Self:
        return cls("reverse-kl")

    @classmethod
    def mixture(cls, share: float, *, of_residual: float = 0.0, of_model: float = 0.0) -> Self:
        return cls("mixture", share, of_residual, of_model)

    @classmethod
    def total_variation(cls) -> Self:
        return cls("total-variation")


@dataclass(frozen=True)
class ResidualColumns:
    """Where a residual's numbers stand in a partial: m_u, s_u, x_u, and h_u and t_y where they are requested.

    sums: s_u, x_u and h_u, which move with the maximum. rest: all but the maximum.
    """

    max: int
    sum_exp: int
    cross: int
    centred: int | None
    label_logit: int | None
    sums: slice
    rest: slice

    @classmethod
    def next(cls, count: Iterator[int], request: StatisticsRequest) -> ResidualColumns:
        maximum, sum_exp, cross = next(count), next(count), next(count)
        centred = next(count) if request.residual_entropy else None
        label_logit = next(count) if request.residual_label else None
        last_sum = cross if centred is None else centred
        last = last_sum if label_logit is None else label_logit
        return cls(
            maximum, sum_exp, cross, centred, label_logit, slice(sum_exp, last_sum + 1), slice(sum_exp, last + 1)
        )


@dataclass(frozen=True)
class Columns:
    """Where each number stands in a partial: m, s, e, z_y, c and the largest logits, then each residual's, then y.

    base: s, e, z_y and c: what is of the logits but their maximum and the largest ones.
    """

    max: int
    sum_exp: int
    centred: int
    label_logit: int
    collision: int | None
    base: slice
    top: slice
    residuals: tuple[ResidualColumns, ...]
    reverse_cross: int | None
    width: int


@dataclass(frozen=True)
class StatisticsRequest:
    """Which statistics are computed, and travel, besides those that every objective has.

    residuals:        (a, b) of each residual softmax(a*z + b*t), at most MAX_RESIDUALS.
    collision:        sum_k p_k^2.
    top_k:            this many of the largest logits (0: none).
    residual_entropy: the entropy of each residual, which KL(r || p) needs.
    residual_label:   log r(y) of each residual.
    divergence:       of the model from the first residual, and its derivative's mean.
    """

    residuals: Residuals = ()
    collision: bool = False
    top_k: int = 0
    residual_entropy: bool = False
    residual_label: bool = False
    divergence: Divergence | None = None

    def __post_init__(self) -> None:
        if len(self.residuals) > MAX_RESIDUALS:
            raise ValueError(f"an objective has at most {MAX_RESIDUALS} residuals, got {len(self.residuals)}")
        for coefficients in self.residuals:
            if len(coefficients) != 2 or not all(math.isfinite(c) for c in coefficients):
                raise ValueError(f"a residual is a pair of finite numbers (a, b), got {coefficients!r}")
        if not isinstance(self.top_k, int) or isinstance(self.top_k, bool) or self.top_k < 0:
            raise ValueError(f"top_k must be a whole number of logits, 0 or more, got {self.top_k!r}")
        if self.divergence is not None and not self.residuals:
            raise ValueError("a divergence is taken from the first residual, got no residuals")

    @property
    def reverse_cross(self) -> bool:
        """Whether y is among what travels."""
        return self.divergence is not None and self.divergence.kind == "reverse-kl"

    @property
    def second_pass(self) -> bool:
        """Whether the divergence needs the merged sums before its own."""
        return self.divergence is not None and not self.reverse_cross

    @functools.cached_property
    def columns(self) -> Columns:
        """Where they stand in a partial."""
        count = itertools.count()
        maximum, sum_exp, centred, label_logit = (next(count) for _ in range(4))
        collision = next(count) if self.collision else None
        largest = next(count)
        count = itertools.count(largest + self.top_k)
        residuals = tuple(ResidualColumns.next(count, self) for _ in self.residuals)
        base, top = slice(sum_exp, largest), slice(largest, largest + self.top_k)
        reverse = next(count) if self.reverse_cross else None
        return Columns(maximum, sum_exp, centred, label_logit, collision, base, top, residuals, reverse, next(count))

    @property
    def width(self) -> int:
        """Numbers per token and rank that travel in the first collective (float32 each)."""
        return self.columns.width

    @functools.cached_property
    def merged_rows(self) -> int:
        """Statistics of a token over the whole vocabulary, besides its largest logits; see TokenStatistics."""
        of_divergence = 0 if self.divergence is None else _MERGED_DIVERGENCE
        return _MERGED_BASE + self.collision + self.merged_residual * len(self.residuals) + of_divergence

    @functools.cached_property
    def merged_sums(self) -> list[int]:
        """Which of them are sum_exp, of the logits and of each residual."""
        first = _MERGED_BASE + self.collision
        return [1, *(first + self.merged_residual * index + 1 for index in range(len(self.residuals)))]

    @functools.cached_property
    def merged_residual(self) -> int:
        """How many of merged_rows each residual has."""
        return _MERGED_RESIDUAL + self.residual_entropy + self.residual_label

    @functools.cached_property
    def evaluated_rows(self) -> int:
        """merged_rows, and those that an objective adds: its masses and the trust."""
        return self.merged_rows + _TOTALS


class _Row:
    """A field that is a row of the instance's ``rows``; the view is made when it is first read, and kept."""

    def __init__(self, index: int):
        self._index = index

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _Row: ...

    @overload
    def __get__(self, instance: ResidualStatistics | TokenStatistics, owner: type) -> Tensor: ...

    def __get__(self, instance: Any, owner: type) -> Tensor | _Row:
        if instance is None:
            return self
        row: Tensor = instance.rows[self._index]
        instance.__dict__[self._name] = row
        return row


class ResidualStatistics:
    """Statistics of one residual ``r = softmax(a*z + b*t)`` over the whole vocabulary; every tensor is [N].

    max, sum_exp: of u = a*z + b*t with the kernels' rounded a and b; sum_exp is centred on max.
    lse:          log sum_k exp(u_k). With one operand (a or b is 0) of the exact a and b: what rounding them moves u by
                  grows with the distance of the logits from 0.
    mean_logit:   sum_k r_k z_k, the student logit averaged under r.
    entropy:      -sum_k r_k log r_k, in nats; None unless requested (residual_entropy).
    log_p:        log r(y) of the label; None unless requested (residual_label).
    """

    max, sum_exp, lse, mean_logit = _Row(0), _Row(1), _Row(2), _Row(3)

    def __init__(self, rows: Tensor, request: StatisticsRequest):
        self.rows, self._request = rows, request

    @property
    def entropy(self) -> Tensor | None:
        return self.rows[_MERGED_RESIDUAL] if self._request.residual_entropy else None

    @property
    def log_p(self) -> Tensor | None:
        return self.rows[-1] if self._request.residual_label else None


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
    divergence:    D(p, r) from the first residual, in nats but for total variation; None unless requested.
    slope:         sum_k p_k h_k of its derivative h, see Divergence; None unless requested.
    sample_mean:   mean over the supervised tokens of the token's sample of what the objective's sample_mean is of a
                   token; None unless it has one.
    sample_size:   how many these are; None likewise.
    sample_after:  sum over the supervised tokens of the token's sample that come after its block of what the
                   objective's sample_after is of a token; None unless it has one.
    tokens_after:  how many these are; None likewise.

    None until the objective has been evaluated:

    label_mass:     c_y.
    residual_mass:  sum of c_r over the residuals, and the divergence's mass.
    trust:          c_y / (c_y + c_r), NaN where the total mass is 0.

    All but top_logits are views of rows, float64 ``[request.evaluated_rows, N]``::

        always                  max, sum_exp, log_p, p, entropy
        collision               collision
        for each residual       max, sum_exp, lse, mean_logit
            residual_entropy    entropy
            residual_label      log_p
        divergence              divergence, slope
        where evaluated         label_mass, residual_mass, trust
    """

    max, sum_exp, log_p, p, entropy = _Row(0), _Row(1), _Row(2), _Row(3), _Row(4)

    def __init__(
        self,
        rows: Tensor,
        supervised: Tensor,
        request: StatisticsRequest,
        top_logits: Tensor | None = None,
        *,
        evaluated: bool = False,
    ):
        self.rows, self.supervised, self.request, self.top_logits = rows, supervised, request, top_logits
        self.evaluated = evaluated
        self.sample_mean: Tensor | None = None
        self.sample_size: Tensor | None = None
        self.sample_after: Tensor | None = None
        self.tokens_after: Tensor | None = None

    @property
    def collision(self) -> Tensor | None:
        return self.rows[_MERGED_BASE] if self.request.collision else None

    @functools.cached_property
    def residuals(self) -> tuple[ResidualStatistics, ...]:
        first, count = _MERGED_BASE + self.request.collision, self.request.merged_residual
        starts = (first + count * index for index in range(len(self.request.residuals)))
        return tuple(ResidualStatistics(self.rows[start : start + count], self.request) for start in starts)

    @property
    def divergence(self) -> Tensor | None:
        return None if self.request.divergence is None else self.rows[self.request.merged_rows - 2]

    @property
    def slope(self) -> Tensor | None:
        return None if self.request.divergence is None else self.rows[self.request.merged_rows - 1]

    @property
    def label_mass(self) -> Tensor | None:
        return self.rows[-3] if self.evaluated else None

    @property
    def residual_mass(self) -> Tensor | None:
        return self.rows[-2] if self.evaluated else None

    @property
    def trust(self) -> Tensor | None:
        return self.rows[-1] if self.evaluated else None

    def reshaped(self, shape: torch.Size) -> TokenStatistics:
        """With every [N, ...] tensor as [*shape, ...]."""
        top_logits = self.top_logits
        found = TokenStatistics(
            self.rows.reshape(len(self.rows), *shape),
            self.supervised.reshape(shape),
            self.request,
            None if top_logits is None else top_logits.reshape(*shape, top_logits.shape[1]),
            evaluated=self.evaluated,
        )
        return self._with_samples(found, lambda values: values.reshape(shape))

    def scattered(self, tokens: Tensor, supervised: Tensor) -> TokenStatistics:
        """As those of all tokens, [N], of which these are at the positions tokens and the others not supervised."""
        rows = self.rows.new_zeros(len(self.rows), len(supervised))
        for row in self.request.merged_sums:
            rows[row] = 1
        top_logits = self.top_logits
        if top_logits is not None:
            whole = top_logits.new_zeros(len(supervised), top_logits.shape[1])
            top_logits = whole.index_copy_(0, tokens, top_logits)
        rows.index_copy_(1, tokens, self.rows)
        found = TokenStatistics(rows, supervised, self.request, top_logits, evaluated=self.evaluated)
        return self._with_samples(found, lambda own: rows.new_zeros(len(supervised)).index_copy_(0, tokens, own))

    def _with_samples(self, found: TokenStatistics, function: Callable[[Tensor], Tensor]) -> TokenStatistics:
        """With the statistics of samples as a function gives them."""
        for name in ("sample_mean", "sample_size", "sample_after", "tokens_after"):
            own = getattr(self, name)
            setattr(found, name, None if own is None else function(own))
        return found

    @property
    def lse(self) -> Tensor:
        return self.max + self.sum_exp.log()

    @property
    def total_mass(self) -> Tensor:
        """M = c_y + c_r, the scale of the objective at this token. ValueError until the objective is evaluated."""
        label_mass, residual_mass = self.label_mass, self.residual_mass
        if label_mass is None or residual_mass is None:
            raise ValueError("total_mass needs the masses, which these statistics have once the objective is evaluated")
        return label_mass + residual_mass

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
