"""The kernels' formulas in plain PyTorch: a Backend for any floating dtype (float64 included) and any device.

Sums are taken in float32 for logits of at most 32 bits and in float64 for float64 logits; a residual's exponent is
made in float64 and rounded last, as the native kernels round it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qtarget_megatron.statistics import (
    Divergence,
    Residuals,
    StatisticsRequest,
    TokenStatistics,
    VocabularyShard,
    kernel_coefficients,
)


def partial_statistics(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    request: StatisticsRequest,
    shard: VocabularyShard,
) -> Tensor:
    """As of Backend."""
    valid_columns = shard.valid_columns
    supervised = labels != shard.ignore_index
    z = _valid(logits, valid_columns)
    local = labels - shard.start
    here = supervised & (local >= 0) & (local < valid_columns)

    def at_label(values: Tensor) -> Tensor:
        if valid_columns == 0:
            return values.new_zeros(values.shape[0])
        value = values.gather(1, local.clamp(0, valid_columns - 1)[:, None]).squeeze(1)
        return torch.where(here, value, torch.zeros_like(value))

    m = _row_max(z)
    shifted = z - _finite_or_zero(m)[:, None]
    weight = shifted.exp()
    columns = [m, weight.sum(-1), _weighted_sum(weight, shifted), at_label(z)]
    if request.collision:
        columns.append(weight.square().sum(-1))
    if request.top_k:
        largest = z.topk(min(request.top_k, valid_columns), dim=-1).values
        largest = torch.nn.functional.pad(largest, (0, request.top_k - largest.shape[1]), value=-torch.inf)
        columns += largest.unbind(-1)
    residual_exponents: list[Tensor] = []
    for a, b in kernel_coefficients(request.residuals, z.dtype):
        t = _valid_teacher(teacher_logits, valid_columns) if b != 0 else torch.zeros_like(z)
        u = residual_logits(z, t, a, b)
        m_u = _row_max(u).to(z.dtype)
        shifted_u = (u - _finite_or_zero(m_u)[:, None]).to(z.dtype)
        weight_u = shifted_u.exp()
        # Without a finite logit there is no local centre: merge() adds the (infinite) offset instead.
        cross = _weighted_sum(weight_u, shifted)
        columns += [m_u, weight_u.sum(-1), torch.where(m == -torch.inf, torch.zeros_like(cross), cross)]
        if request.residual_entropy:
            columns.append(_weighted_sum(weight_u, shifted_u))
        if request.residual_label:
            columns.append(at_label(t))
        if len(residual_exponents) == 0:
            residual_exponents.append(shifted_u)
    if request.reverse_cross:
        columns.append(_weighted_sum(weight, residual_exponents[0]))
    out = torch.stack(columns, dim=-1)
    return torch.where(supervised[:, None], out, torch.zeros_like(out))


def logit_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    residuals: Residuals,
    shard: VocabularyShard,
    maxima: Tensor,
    scales: Tensor,
    out: Tensor,
    divergence: Divergence | None = None,
) -> None:
    """As of Backend."""
    valid_columns = shard.valid_columns
    z = _valid(logits, valid_columns)
    active = (labels != shard.ignore_index) & (scales != 0).any(0)
    gradient = (z - maxima[0, :, None]).exp() * scales[0, :, None]
    if divergence is not None:
        t = _valid_teacher(teacher_logits, valid_columns) if residuals[0][1] != 0 else None
        gradient += divergence_gradient(z, t, residuals=residuals, divergence=divergence, maxima=maxima, scales=scales)
    for index, (a, b) in enumerate(kernel_coefficients(residuals, z.dtype)):
        u = residual_logits(z, _valid_teacher(teacher_logits, valid_columns) if b != 0 else None, a, b)
        maximum, scale = maxima[1 + index, :, None], scales[2 + index, :, None]
        term = (u - maximum).to(z.dtype).exp() * scale
        gradient -= torch.where(scale == 0, torch.zeros_like(term), term)
    local = labels - shard.start
    here = active & (local >= 0) & (local < valid_columns)
    rows = here.nonzero().squeeze(1)
    gradient[rows, local[rows]] -= scales[1, rows]
    out[:, :valid_columns] = torch.where(active[:, None], gradient, torch.zeros_like(gradient)).to(out.dtype)
    out[:, valid_columns:] = 0


def divergence_sums(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    residuals: Residuals,
    divergence: Divergence,
    shard: VocabularyShard,
    maxima: Tensor,
    scales: Tensor,
) -> Tensor:
    """As of Backend."""
    valid_columns = shard.valid_columns
    t = _valid_teacher(teacher_logits, valid_columns) if residuals[0][1] != 0 else None
    parts = divergence_elements(
        _valid(logits, valid_columns), t, residuals=residuals, divergence=divergence, maxima=maxima, scales=scales
    )
    out = torch.stack([part.sum(-1) for part in parts], dim=-1)
    return torch.where((labels != shard.ignore_index)[:, None], out, torch.zeros_like(out))


def divergence_elements(
    z: Tensor, t: Tensor | None, *, residuals: Residuals, divergence: Divergence, maxima: Tensor, scales: Tensor
) -> tuple[Tensor, Tensor]:
    """p_k h(l_k), and p_k A(l_k) + r_k B(l_k), of every column; arguments as of divergence_sums."""
    log_ratio, exponents = _log_ratio(z, t, residuals, maxima)
    p = (z - maxima[0, :, None]).exp() * scales[0, :, None]
    r = exponents.exp() * scales[1, :, None]
    slope, of_model, of_residual = divergence_terms(divergence, log_ratio)
    return _product(p, slope), _product(p, of_model) + _product(r, of_residual)


def divergence_gradient(
    z: Tensor, t: Tensor | None, *, residuals: Residuals, divergence: Divergence, maxima: Tensor, scales: Tensor
) -> Tensor:
    """The divergence's term of every column; arguments as of logit_gradient."""
    log_ratio, _ = _log_ratio(z, t, residuals, maxima)
    slope = divergence_terms(divergence, log_ratio)[0] - maxima[-1, :, None]
    return _product((z - maxima[0, :, None]).exp() * scales[-1, :, None], slope)


def divergence_terms(divergence: Divergence, log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """h, A and B at l = log p - log r, see Divergence."""
    if divergence.kind == "reverse-kl":
        return log_ratio, log_ratio, torch.zeros_like(log_ratio)
    if divergence.kind == "total-variation":
        # Closer than the logits' dtype can tell, which of the two is larger is rounding.
        tie = 2**-20 if log_ratio.dtype == torch.float32 else 2**-46
        half = torch.where(log_ratio.abs() > tie, log_ratio.sign() / 2, 0 * log_ratio.clamp(-1, 1))
        return half, half, -half
    share, rest = divergence.share, 1 - divergence.share
    # The smaller of p and r over the larger, so that nothing overflows; d is m over the larger.
    ratio, model_larger = (-log_ratio.abs()).exp(), log_ratio >= 0
    d = torch.where(model_larger, share * ratio + rest, share + rest * ratio)
    model_over_m, residual_over_m = torch.where(model_larger, 1.0, ratio) / d, torch.where(model_larger, ratio, 1.0) / d
    log_model = torch.where(model_larger, -d.log(), log_ratio - d.log())
    log_residual = torch.where(model_larger, -d.log() - log_ratio, -d.log())
    # Where the model has all of m, log x + 1 - x is far smaller than its terms: both must be of the same x.
    x = rest * model_over_m
    log_x = torch.where(x < 2**-14, log_model + math.log(rest), x.log())
    slope = divergence.of_model * (log_x + (1 - x))
    slope = slope - divergence.of_residual * rest * residual_over_m
    return slope, divergence.of_model * log_model, divergence.of_residual * log_residual


def _log_ratio(z: Tensor, t: Tensor | None, residuals: Residuals, maxima: Tensor) -> tuple[Tensor, Tensor]:
    """log p - log r of the first residual, and its u - max u. The row of maxima behind those is log s - log s_u."""
    ((a, b), *_) = kernel_coefficients(residuals, z.dtype)
    exponents = (residual_logits(z, t, a, b) - maxima[1, :, None]).to(z.dtype)
    return z - maxima[0, :, None] - exponents - maxima[1 + len(residuals), :, None], exponents


def supervised(labels: Tensor, *, vocab_size: int, ignore_index: int) -> tuple[Tensor, int]:
    """As of Backend."""
    found = labels != ignore_index
    if labels.device.type != "cpu":
        return found, -1
    wrong = (found & ((labels < 0) | (labels >= vocab_size))).reshape(-1).nonzero()
    return found, int(wrong[0]) if len(wrong) else -1


def merge(
    partials: Tensor,
    supervised: Tensor,
    *,
    request: StatisticsRequest,
    residuals: Sequence[tuple[float, float, float]],
    out: Tensor,
) -> None:
    """As of Backend."""
    columns, values = request.columns, partials.double().unbind(-1)
    m, s, e = values[columns.max], values[columns.sum_exp], values[columns.centred]
    ignored = ~supervised
    shift = _Shift(m)
    # e is centred on the local maximum; centre it on the global one.
    sum_exp, centred = shift.totals(s, shift.recentred(e, s))
    sum_exp = sum_exp.masked_fill(ignored, 1.0)
    log_sum = sum_exp.log()
    # Subtracting the maximum first keeps the precision of the label logit at large offsets.
    label_logit = values[columns.label_logit].sum(0)
    log_p = (label_logit - shift.max) - log_sum
    rows = [shift.max, sum_exp, log_p, log_p.exp().masked_fill(ignored, 0.0), log_sum - centred / sum_exp]
    if columns.collision is not None:
        (collision,) = shift.totals(values[columns.collision], power=2)
        rows.append(collision / sum_exp**2)
    for (a, b, rounding), of_residual in zip(residuals, columns.residuals, strict=True):
        m_u, s_u, x_u = values[of_residual.max], values[of_residual.sum_exp], values[of_residual.cross]
        shift_u = _Shift(m_u)
        sums = [s_u, x_u]
        if len(partials) > 1:
            # A shard whose logits are all -inf but which carries residual mass makes the mean -inf, as it should.
            sums[1] = x_u + (m - shift.max).masked_fill(s_u == 0, 0.0) * s_u
        if of_residual.centred is not None:
            sums.append(shift_u.recentred(values[of_residual.centred], s_u))
        sum_exp_u, cross, *centred_u = shift_u.totals(*sums)
        sum_exp_u = sum_exp_u.masked_fill(ignored, 1.0)
        log_sum_u = sum_exp_u.log()
        rows += [shift_u.max, sum_exp_u, shift_u.max * rounding + log_sum_u, cross / sum_exp_u + shift.max]
        if centred_u:
            rows.append(log_sum_u - centred_u[0] / sum_exp_u)
        if of_residual.label_logit is not None:
            of_label = residual_logits(label_logit, values[of_residual.label_logit].sum(0), a, b)
            rows.append((of_label - shift_u.max) - log_sum_u)
    if columns.reverse_cross is not None:
        reverse, m_u = values[columns.reverse_cross], values[columns.residuals[0].max]
        shift_u, log_sum_u = _Shift(m_u), rows[request.merged_sums[1]].log()
        if len(partials) > 1:
            # Where a shard of p's mass has no finite u, the divergence is infinite, as it should.
            reverse = reverse + (m_u - shift_u.max).masked_fill((s == 0) | (m_u == shift_u.max), 0.0) * s
        (reverse,) = shift.totals(reverse)
        divergence = (log_sum_u - reverse / sum_exp) - rows[4]
        rows += [divergence, divergence]
    elif request.divergence is not None:
        rows += [torch.zeros_like(sum_exp)] * 2
    torch.stack(rows, out=out[: len(rows)])


class _Shift:
    """Moves sums centred on each rank's maximum [T, N] to the global maximum [N]; of one rank they are there."""

    def __init__(self, local_max: Tensor):
        self._alone = len(local_max) == 1
        self.max = local_max.amax(0)
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


def weigh(
    rows: Tensor,
    supervised: Tensor,
    *,
    request: StatisticsRequest,
    loss: Tensor | None,
    label_mass: Tensor | float,
    residual_masses: Sequence[Tensor | float],
    guards: Sequence[Tensor],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As of Backend."""
    ignored = ~supervised

    def per_token(value: Tensor | float) -> Tensor:
        if not isinstance(value, Tensor):
            value = torch.full_like(rows[0], value)
        return value.masked_fill(ignored, 0.0)

    stats = TokenStatistics(rows, supervised, request)
    of_all = [per_token(mass) for mass in residual_masses]
    masses = of_all[: len(stats.residuals)]
    label_mass, residual_mass = per_token(label_mass), sum(of_all[1:], of_all[0]) if of_all else per_token(0.0)
    # The divergence's gradient has a mean of its own: it adds nothing to what p is multiplied with.
    total = label_mass + sum(masses[1:], masses[0]) if masses else label_mass
    trust = label_mass / (label_mass + residual_mass)
    torch.stack([label_mass, residual_mass, per_token(trust)], out=rows[-3:])
    divergence, slope = stats.divergence, stats.slope
    if loss is None:
        loss = torch.zeros_like(total) + stats.weighted_nll(label_mass)
        for index, mass in enumerate(masses):
            loss = loss + (mass * stats.cross_entropy(index)).masked_fill(mass == 0, 0.0)
        if divergence is not None:
            loss = loss + (of_all[-1] * divergence).masked_fill(of_all[-1] == 0, 0.0)
    guarded = [stats.log_p, *(residual.mean_logit for residual in stats.residuals)]
    if divergence is not None:
        guarded.append(divergence)
    for statistic in (*guarded, *guards):
        loss = torch.where(statistic == statistic, loss, statistic)
    maxima = [stats.max, *(residual.max for residual in stats.residuals)]
    scales = [mass / residual.sum_exp for mass, residual in zip(masses, stats.residuals, strict=True)]
    if slope is not None:
        maxima += [stats.sum_exp.log() - stats.residuals[0].sum_exp.log(), slope]
        scales.append(of_all[-1] / stats.sum_exp)
    return (
        per_token(loss).to(dtype),
        torch.stack(maxima).to(dtype),
        torch.stack([total / stats.sum_exp, label_mass, *scales]),
    )


def chain(scales: Tensor, upstream: Tensor) -> Tensor:
    """As of Backend."""
    return (scales * upstream).masked_fill_(upstream == 0, 0.0).to(upstream.dtype)


def _valid(logits: Tensor, valid_columns: int) -> Tensor:
    logits = logits[:, :valid_columns]
    return logits if logits.dtype == torch.float64 else logits.float()


def _valid_teacher(teacher_logits: Tensor | None, valid_columns: int) -> Tensor:
    if teacher_logits is None:
        raise ValueError("a residual with b != 0 reads teacher_logits: expected a tensor, got None")
    return _valid(teacher_logits, valid_columns)


def residual_logits(z: Tensor, t: Tensor | None, a: float, b: float) -> Tensor:
    """u = a z + b t in float64. A coefficient of 0 removes its operand: 0 * -inf would be NaN."""
    z = z.double()
    u = a * z if a != 0 else torch.zeros_like(z)
    if b == 0:
        return u
    assert t is not None
    return u + b * t.double()


def _row_max(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), -torch.inf)
    return values.amax(-1)


def _finite_or_zero(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -torch.inf, torch.zeros_like(maximum), maximum)


def _weighted_sum(weight: Tensor, values: Tensor) -> Tensor:
    return _product(weight, values).sum(-1)


def _product(weight: Tensor, values: Tensor) -> Tensor:
    """weight * values, where a weight of 0 removes the value."""
    return torch.where(weight == 0, torch.zeros_like(values), weight * values)
