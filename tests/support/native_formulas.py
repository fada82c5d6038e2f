"""What the native kernels are compared with: the definitions, row by row in float64."""

from __future__ import annotations

import math
from typing import NamedTuple

import emulated_kernels
import pytest
import torch

from qtarget_megatron import _C
from qtarget_megatron.kernels import native
from qtarget_megatron.statistics import Divergence, StatisticsRequest, VocabularyShard

INF, NAN = math.inf, math.nan
IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
UNIFORM, TEACHER, MIXED, TEMPERED = (0.0, 0.0), (0.0, 1.0), (0.5, 0.5), (1 / 0.7, 0.0)

DIVERGENCES = {
    "reverse-kl": Divergence.reverse_kl(),
    "jsd": Divergence.mixture(0.3, of_residual=0.3, of_model=0.7),
    "skew-kl": Divergence.mixture(0.1, of_residual=1.0),
    "skew-reverse-kl": Divergence.mixture(0.9, of_model=1.0),
    "total-variation": Divergence.total_variation(),
}

ISAS = ["scalar", "avx2", "avx512"]
# emulated: the CUDA kernels on the CPU.
DEVICES = [
    *ISAS,
    pytest.param("emulated", marks=pytest.mark.slow),
    pytest.param("cuda", marks=pytest.mark.cuda),
]


def device_of(request):
    """Yields the device of the test's tensors, with the CPU's instruction set forced or its kernels replaced."""
    if request.param == "cuda":
        yield "cuda"
    elif request.param == "emulated":
        with emulated_kernels.in_place_of_the_cpu_s(request.getfixturevalue("emulated_module")):
            yield "cpu"
    else:
        force_isa(request.param)
        yield "cpu"
        _C.set_cpu_isa("auto")


def has_hardware_exponential(tensor):
    return tensor.is_cuda or emulated_kernels.are_in_use()


def force_isa(name):
    try:
        _C.set_cpu_isa(name)
    except ValueError as error:
        pytest.skip(str(error))


def request_of(residuals, **wanted):
    """A request that asks for the residuals' entropy unless told otherwise: m_u, s_u, x_u, h_u."""
    return StatisticsRequest(residuals, **({"residual_entropy": True} | wanted))


def exact_statistics(z, t, labels, residuals, vocab_start, valid, **wanted):
    """The definition, row by row in float64 on the CPU; for finite logits and -inf."""
    request = request_of(residuals, **wanted)
    z = z[:, :valid].double().cpu()
    rows = []
    for i, label in enumerate(labels.tolist()):
        if label == IGNORE:
            rows.append([0.0] * request.width)
            continue
        m, centred = centre(z[i])
        column = label - vocab_start
        here = 0 <= column < valid
        row = [m, centred.exp().sum(), product_sum(centred.exp(), centred), z[i, column] if here else 0.0]
        if request.collision:
            row.append((2 * centred).exp().sum())
        if request.top_k:
            largest = sorted(z[i].tolist(), reverse=True)[: request.top_k]
            row += largest + [-INF] * (request.top_k - len(largest))
        for a, b in residuals:
            u = torch.zeros(valid, dtype=torch.float64)
            u = u + a * z[i] if a else u
            u = u + b * t[i, :valid].double().cpu() if b else u
            m_u, centred_u = centre(u)
            weight = centred_u.exp()
            row += [m_u, weight.sum(), product_sum(weight, centred) if m > -INF else 0.0]
            if request.residual_entropy:
                row.append(product_sum(weight, centred_u))
            if request.residual_label:
                row.append(t[i, column] if here and b else 0.0)
            if (a, b) == residuals[0]:
                reverse = product_sum(centred.exp(), centred_u)
        if request.reverse_cross:
            row.append(reverse)
        rows.append([float(value) for value in row])
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), request.width)


def centre(values):
    m = values.max().item() if len(values) else -INF
    return m, values - (m if m > -INF else 0.0)


def product_sum(weight, values):
    present = weight != 0
    return (weight[present] * values[present]).sum()


def as_rows(max_, scale, label_scale, residual_max=(), residual_scale=()):
    """As logit_gradient takes them: one row for each."""
    maxima, scales = (max_, *residual_max), (scale, label_scale, *residual_scale)
    return dict(maxima=torch.stack(maxima), scales=torch.stack(scales))


class ExactGradient(NamedTuple):
    """value: the gradient in float64. of_exponents: sum of |x| exp(x) scale over its terms exp(x) scale."""

    value: torch.Tensor
    of_exponents: torch.Tensor


def exact_gradient(z, t, labels, residuals, vocab_start, valid, scales):
    z64, out = z.double().cpu(), torch.zeros(z.shape, dtype=torch.float64)
    of_exponents = torch.zeros_like(out)
    s = {name: value.double().cpu() for name, value in scales.items()}

    def term(row, exponents, scale):
        weights = exponents.exp() * scale
        of_exponents[row, :valid] += torch.where(weights == 0, 0.0, exponents.abs() * weights)
        return weights

    for i, label in enumerate(labels.tolist()):
        all_scales = [s["scale"][i], s["label_scale"][i], *s["residual_scale"][:, i]]
        if label == IGNORE or not any(all_scales):
            continue
        out[i, :valid] = term(i, z64[i, :valid] - s["max_"][i], s["scale"][i])
        if 0 <= label - vocab_start < valid:
            out[i, label - vocab_start] -= s["label_scale"][i]
        for r, (a, b) in enumerate(residuals):
            u = torch.zeros(valid, dtype=torch.float64)
            u = u + a * z64[i, :valid] if a else u
            u = u + b * t[i, :valid].double().cpu() if b else u
            if s["residual_scale"][r, i] != 0:
                out[i, :valid] -= term(i, u - s["residual_max"][r, i], s["residual_scale"][r, i])
    return ExactGradient(out, of_exponents)


class ExactDivergence(NamedTuple):
    """mean: of h under p [N]. value: D(p, r) [N]. gradient: p_k (h_k - mean) [N, V]. of_exponents: as of ExactGradient,
    for what rounding an exponent moves of any of them. maxima, scales: what the kernels are given, float32."""

    mean: torch.Tensor
    value: torch.Tensor
    gradient: torch.Tensor
    of_exponents: torch.Tensor
    maxima: torch.Tensor
    scales: torch.Tensor


def exact_divergence(z, t, labels, residual, valid, divergence):
    """The definition over p, r and their mixture; 0 where ignored. Of a whole vocabulary in one shard."""
    (a, b), zeros = residual, torch.zeros(z.shape[0], valid, dtype=torch.float64)
    z, u = z[:, :valid].double().cpu(), zeros
    u = u + a * z if a else u
    u = u + b * t[:, :valid].double().cpu() if b else u
    p, r = torch.softmax(z, -1), torch.softmax(u, -1)
    log_p, log_r = torch.log_softmax(z, -1), torch.log_softmax(u, -1)
    if divergence.kind == "reverse-kl":
        h, value = log_p - log_r, _present(p, log_p - log_r)
    elif divergence.kind == "total-variation":
        # What float32 cannot tell apart is equal.
        h, value = (p - r).sign() * ((log_p - log_r).abs() > 2**-20) / 2, (p - r).abs() / 2
    else:
        log_m = torch.logaddexp(log_r + math.log(divergence.share), log_p + math.log1p(-divergence.share))
        to_p, to_r = divergence.of_model, divergence.of_residual
        rest = 1 - divergence.share
        log_x = log_p - log_m + math.log1p(-divergence.share)
        h = to_p * (log_x + 1 - log_x.exp()) - to_r * rest * (log_r - log_m).exp()
        value = to_p * _present(p, log_p - log_m) + to_r * _present(r, log_r - log_m)
    kept = (labels != IGNORE).cpu()[:, None]
    mean = _present(p, h).sum(-1, keepdim=True)
    # Rounded, as they travel; the sums are centred on just these.
    m, m_u = z.amax(-1).float().double(), u.amax(-1).float().double()
    sums = [(values - top[:, None]).exp().sum(-1) for values, top in ((z, m), (u, m_u))]
    sizes = [torch.where(values == -INF, 0.0, (values - top[:, None]).abs()) for values, top in ((z, m), (u, m_u))]
    size = sizes[0] + sizes[1]
    return ExactDivergence(
        (mean * kept)[:, 0],
        value.sum(-1) * kept[:, 0],
        _present(p, h - mean) * kept,
        (p + r) * size * kept,
        torch.stack([m, m_u, sums[0].log() - sums[1].log()]).float(),
        (1 / torch.stack(sums)).float(),
    )


def _present(weight, values):
    return torch.where(weight == 0, 0.0, weight * values)


def draw(rows, columns, dtype, device="cpu", spread=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator) * spread
    return values.to(dtype).to(device)


def draw_labels(rows, columns, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(columns, 1), (rows,), generator=generator).to(device)


def statistics(z, t, labels, residuals, vocab_start=0, valid=None, **wanted):
    valid = z.shape[1] if valid is None else valid
    return native.partial_statistics(
        z,
        t,
        labels,
        request=request_of(residuals, **wanted),
        shard=VocabularyShard(vocab_start, valid, IGNORE),
    )


def columns_of(residuals, **wanted):
    """The columns of each part of a partial: base, c, top, and of each residual: m_u, s_u, x_u, h_u, t_y; then y."""
    request = request_of(residuals, **wanted)
    lengths = {"base": 4, "c": int(request.collision), "top": request.top_k}
    for index in range(len(residuals)):
        lengths |= {(name, index): 1 for name in ("m_u", "s_u", "x_u")}
        lengths |= {("h_u", index): int(request.residual_entropy), ("t_y", index): int(request.residual_label)}
    lengths["y"] = int(request.reverse_cross)
    columns, start = {}, 0
    for name, length in lengths.items():
        columns[name] = slice(start, start + length)
        start += length
    return columns


def assert_statistics(got, expected):
    # m_u is rounded to float32 and centres its sums: compare what the merge makes of them.
    assert got.dtype == torch.float32
    got = got.double().cpu()
    torch.testing.assert_close(got[:, :4], expected[:, :4], rtol=1e-6, atol=1e-6)
    for start in range(4, got.shape[1], 4):
        ours, exact = got[:, start : start + 4], expected[:, start : start + 4]
        lse = [part[:, 0] + part[:, 1].log() for part in (ours, exact)]
        torch.testing.assert_close(*lse, rtol=3e-7, atol=1e-6)
        for column in (2, 3):
            means = [torch.where(part[:, 1] == 0, 0.0, part[:, column] / part[:, 1]) for part in (ours, exact)]
            torch.testing.assert_close(*means, rtol=2e-6, atol=3e-6)
