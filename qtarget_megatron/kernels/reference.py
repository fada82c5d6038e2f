"""The kernels' formulas in plain PyTorch, for any floating dtype (float64 included) and any device.

Sums are taken in float32 for logits of at most 32 bits and in float64 for float64 logits; a residual's exponent is
made in float64 and rounded last, as the native kernels round it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtarget_megatron.statistics import Residuals, StatisticsRequest, kernel_coefficients


def partial_statistics(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    request: StatisticsRequest,
    vocab_start: int,
    valid_columns: int,
    ignore_index: int,
) -> Tensor:
    """Reduce this rank's shard to ``[N, request.width]``; the layout is documented in statistics.py.

    logits, teacher_logits: ``[N, V_local]``; columns from valid_columns on are padding and never read.
    labels: ``[N]`` global ids. Rows of ignored labels are 0.
    """
    supervised = labels != ignore_index
    z = _valid(logits, valid_columns)
    local = labels - vocab_start
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
    for a, b in kernel_coefficients(request.residuals, z.dtype):
        t = _valid(teacher_logits, valid_columns) if b != 0 else torch.zeros_like(z)
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
    out = torch.stack(columns, dim=-1)
    return torch.where(supervised[:, None], out, torch.zeros_like(out))


def logit_gradient(
    logits: Tensor,
    teacher_logits: Tensor | None,
    labels: Tensor,
    *,
    residuals: Residuals,
    vocab_start: int,
    valid_columns: int,
    ignore_index: int,
    max_: Tensor,
    scale: Tensor,
    label_scale: Tensor,
    residual_max: Tensor,
    residual_scale: Tensor,
    out: Tensor,
) -> None:
    """Write the gradient of every row into ``out`` (which may be ``logits`` itself).

        out_k = exp(z_k - max_) scale - [k = y] label_scale - sum_r exp(u_rk - residual_max_r) residual_scale_r

    max_, scale, label_scale: ``[N]``; residual_max, residual_scale: ``[R, N]``. Padding columns, ignored rows and rows
    whose scales are all 0 are written as exact zeros whatever the logits hold.
    """
    z = _valid(logits, valid_columns)
    active = (labels != ignore_index) & ((scale != 0) | (label_scale != 0) | (residual_scale != 0).any(0))
    gradient = (z - max_[:, None]).exp() * scale[:, None]
    for index, (a, b) in enumerate(kernel_coefficients(residuals, z.dtype)):
        u = residual_logits(z, _valid(teacher_logits, valid_columns) if b != 0 else None, a, b)
        term = (u - residual_max[index][:, None]).to(z.dtype).exp() * residual_scale[index][:, None]
        gradient -= torch.where((residual_scale[index] == 0)[:, None], torch.zeros_like(term), term)
    local = labels - vocab_start
    here = active & (local >= 0) & (local < valid_columns)
    rows = here.nonzero().squeeze(1)
    gradient[rows, local[rows]] -= label_scale[rows]
    out[:, :valid_columns] = torch.where(active[:, None], gradient, torch.zeros_like(gradient)).to(out.dtype)
    out[:, valid_columns:] = 0


def _valid(logits: Tensor, valid_columns: int) -> Tensor:
    logits = logits[:, :valid_columns]
    return logits if logits.dtype == torch.float64 else logits.float()


def residual_logits(z: Tensor, t: Tensor | None, a: float, b: float) -> Tensor:
    """u = a z + b t in float64. A coefficient of 0 removes its operand: 0 * -inf would be NaN."""
    z = z.double()
    u = a * z if a != 0 else torch.zeros_like(z)
    return u + b * t.double() if b != 0 else u


def _row_max(values: Tensor) -> Tensor:
    if values.shape[1] == 0:
        return values.new_full((values.shape[0],), -torch.inf)
    return values.amax(-1)


def _finite_or_zero(maximum: Tensor) -> Tensor:
    return torch.where(maximum == -torch.inf, torch.zeros_like(maximum), maximum)


def _weighted_sum(weight: Tensor, values: Tensor) -> Tensor:
    return torch.where(weight == 0, torch.zeros_like(values), weight * values).sum(-1)
