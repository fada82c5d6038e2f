"""The kernels of divergences against their definitions in float64, on every instruction set and device.

A log ratio l = (z - m) - (u - m_u) - (log s - log s_u) is rounded at the size of its parts, and so is what it enters:
the bounds below are some units of 2^-24 of those, each times its probability.
"""

from __future__ import annotations

import pytest
import torch
from native_formulas import (
    DEVICES,
    DIVERGENCES,
    DTYPES,
    IGNORE,
    INF,
    ISAS,
    MIXED,
    NAN,
    TEACHER,
    TEMPERED,
    UNIFORM,
    device_of,
    draw,
    draw_labels,
    exact_divergence,
    force_isa,
)

from qtarget_megatron import _C
from qtarget_megatron.kernels import native
from qtarget_megatron.statistics import Divergence, VocabularyShard

every_kind = pytest.mark.parametrize("kind", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
RESIDUALS = [TEACHER, MIXED, UNIFORM, TEMPERED, (-0.5, 1.0)]


@pytest.fixture(params=DEVICES)
def device(request):
    yield from device_of(request)


def sums(z, t, labels, residual, divergence, exact, valid=None):
    valid = z.shape[1] if valid is None else valid
    return native.divergence_sums(
        z,
        t,
        labels,
        residuals=(residual,),
        divergence=divergence,
        shard=VocabularyShard(0, valid, IGNORE),
        maxima=exact.maxima.to(z.device),
        scales=exact.scales.to(z.device),
    )


def gradient(z, t, labels, residual, divergence, exact, valid=None, out=None, mass=1.0):
    """Of the divergence alone: the masses of all other terms are 0."""
    valid = z.shape[1] if valid is None else valid
    out = torch.full_like(z, 7.0) if out is None else out
    maxima = torch.cat([exact.maxima, exact.mean.float()[None]]).to(z.device)
    scales = torch.zeros(4, z.shape[0], device=z.device)
    scales[3] = mass * exact.scales[0].to(z.device)
    native.logit_gradient(
        z,
        t,
        labels,
        residuals=(residual,),
        divergence=divergence,
        shard=VocabularyShard(0, valid, IGNORE),
        maxima=maxima,
        scales=scales,
        out=out,
    )
    return out


def check(z, t, labels, residual, divergence, exact, valid=None, **keywords):
    valid = z.shape[1] if valid is None else valid
    size = 1e-6 + 4 * 2**-23 * exact.of_exponents.sum(-1)
    found = sums(z, t, labels, residual, divergence, exact, valid).double().cpu()
    for column, expected in ((0, exact.mean), (1, exact.value)):
        assert ((found[:, column] - expected).abs() <= 2e-6 * expected.abs() + size).all(), (column, found, expected)
    got = gradient(z, t, labels, residual, divergence, exact, valid, **keywords)
    assert got.dtype == z.dtype
    error = (got[:, :valid].double().cpu() - exact.gradient).abs()
    # float16 has no number near the smaller ones.
    smallest = 2**-24 if got.dtype == torch.float16 else 0
    relative = torch.finfo(got.dtype).eps / 2 + 2e-6
    assert (error <= relative * exact.gradient.abs() + size[:, None] + smallest).all(), error.max()
    assert (got[:, valid:] == 0).all()
    return got


@pytest.mark.parametrize("residual", RESIDUALS, ids=str)
@every_kind
@every_dtype
@pytest.mark.parametrize("columns", [1, 3, 33, 1031, 2061])
def test_sums_and_gradient_are_the_definition(device, columns, dtype, kind, residual):
    z, t = draw(3, columns, dtype, device), draw(3, columns, dtype, device, seed=1)
    labels = draw_labels(3, columns, device)
    exact = exact_divergence(z, t, labels, residual, columns, DIVERGENCES[kind])
    check(z, t, labels, residual, DIVERGENCES[kind], exact)


@pytest.mark.parametrize("garbage", [NAN, INF, 6e4])
@every_kind
@every_dtype
def test_surroundings_and_padding_never_enter(device, dtype, kind, garbage):
    columns, valid = 1103, 1050
    plain_z, plain_t = draw(4, columns, dtype, device), draw(4, columns, torch.float32, device, seed=1)
    labels = draw_labels(4, valid, device)
    exact = exact_divergence(plain_z, plain_t, labels, TEACHER, valid, DIVERGENCES[kind])
    wide = [torch.full((4, columns + 7), garbage, dtype=m.dtype, device=device) for m in (plain_z, plain_t)]
    z, t = (matrix[:, 3 : 3 + columns] for matrix in wide)
    z[:, :valid], t[:, :valid] = plain_z[:, :valid], plain_t[:, :valid]
    beside = check(z, t, labels, TEACHER, DIVERGENCES[kind], exact, valid)
    before = wide[0].clone()
    in_place = gradient(z, t, labels, TEACHER, DIVERGENCES[kind], exact, valid, out=z)
    assert torch.equal(in_place, beside)
    for outside in (slice(0, 3), slice(3 + columns, None)):
        assert torch.equal(wide[0][:, outside].nan_to_num(), before[:, outside].nan_to_num())


@every_kind
def test_ignored_rows_and_rows_without_a_mass_are_zero_and_never_read(device, kind):
    z, t = draw(4, 100, torch.float32, device), draw(4, 100, torch.float32, device, seed=1)
    labels = draw_labels(4, 100, device)
    labels[1] = IGNORE
    exact = exact_divergence(z, t, labels, TEACHER, 100, DIVERGENCES[kind])
    z[1], t[1] = NAN, NAN
    found = sums(z, t, labels, TEACHER, DIVERGENCES[kind], exact)
    assert (found[1] == 0).all() and found.isfinite().all()
    got = gradient(z, t, labels, TEACHER, DIVERGENCES[kind], exact)
    assert (got[1] == 0).all() and got.isfinite().all() and (got[0] != 0).any()
    z[2], t[3] = NAN, NAN
    assert (gradient(z, t, labels, TEACHER, DIVERGENCES[kind], exact, mass=0.0) == 0).all()


@every_kind
@pytest.mark.parametrize("columns", [4, 40, 3000])
def test_minus_infinite_logits_have_no_weight(device, columns, kind):
    z, t = draw(3, columns, torch.float32, device), draw(3, columns, torch.float32, device, seed=1)
    z[:, ::2] = -INF
    z[1, : columns * 3 // 4] = -INF
    if kind == "reverse-kl":
        t[:, ::4] = -INF  # where p has none either
    else:
        t[:, 1::3] = -INF
        t[2, : columns // 2] = -INF
    labels = torch.full((3,), columns - 1, device=device)
    exact = exact_divergence(z, t, labels, TEACHER, columns, DIVERGENCES[kind])
    got = check(z, t, labels, TEACHER, DIVERGENCES[kind], exact)
    assert (got[:, ::2] == 0).all()


@every_kind
@every_dtype
def test_models_that_agree_on_nothing_stay_within_the_definition(device, dtype, kind):
    z, t = draw(3, 777, dtype, device, spread=30.0), draw(3, 777, dtype, device, spread=30.0, seed=1)
    labels = draw_labels(3, 777, device)
    check(z, t, labels, TEACHER, DIVERGENCES[kind], exact_divergence(z, t, labels, TEACHER, 777, DIVERGENCES[kind]))


@pytest.mark.parametrize("share", [1e-4, 0.5, 1 - 1e-4])
def test_mixtures_of_almost_one_of_both(device, share):
    z, t = draw(3, 777, torch.float32, device, spread=8.0), draw(3, 777, torch.float32, device, spread=8.0, seed=1)
    labels = draw_labels(3, 777, device)
    for divergence in (Divergence.mixture(share, of_residual=1.0), Divergence.mixture(share, of_model=1.0)):
        check(z, t, labels, TEACHER, divergence, exact_divergence(z, t, labels, TEACHER, 777, divergence))


@every_kind
@every_dtype
def test_a_model_is_at_rest_at_its_own_distribution(device, dtype, kind):
    z = draw(3, 1111, dtype, device)
    labels = draw_labels(3, 1111, device)
    exact = exact_divergence(z, z, labels, TEACHER, 1111, DIVERGENCES[kind])
    found = sums(z, z.clone(), labels, TEACHER, DIVERGENCES[kind], exact)
    assert found[:, 1].abs().max() <= 2e-7
    got = gradient(z, z.clone(), labels, TEACHER, DIVERGENCES[kind], exact).abs().max()
    # A ratio of exactly 1: nothing is left but the rounding of a logarithm of almost 1.
    assert got == 0 if kind in ("reverse-kl", "total-variation") else got <= 2e-7


@every_kind
@every_dtype
def test_nan_reaches_the_sums_and_the_gradient(device, dtype, kind):
    columns = 1031
    for column in (0, 500, 1030):
        z, t = draw(3, columns, dtype, device), draw(3, columns, dtype, device, seed=1)
        labels = torch.zeros(3, dtype=torch.int64, device=device)
        exact = exact_divergence(z, t, labels, TEACHER, columns, DIVERGENCES[kind])
        z[0, column] = NAN
        t[1, column] = NAN
        assert sums(z, t, labels, TEACHER, DIVERGENCES[kind], exact).isnan().any(1).tolist() == [True, True, False]
        bad = gradient(z, t, labels, TEACHER, DIVERGENCES[kind], exact).isnan()
        assert bad[:2, column].all() and bad.sum() == 2


def test_a_second_residual_is_beside_a_divergence(device):
    """The divergence is from the first; masses of the others keep their terms."""
    z, t = draw(3, 500, torch.float32, device), draw(3, 500, torch.float32, device, seed=1)
    labels = draw_labels(3, 500, device)
    divergence = DIVERGENCES["jsd"]
    exact = exact_divergence(z, t, labels, TEACHER, 500, divergence)
    shard, other = VocabularyShard(0, 500, IGNORE), torch.softmax(z.double().cpu() / 0.7, -1)
    tempered_max = z.amax(-1) / 0.7
    tempered_sum = (z / 0.7 - tempered_max[:, None]).exp().sum(-1)
    maxima = torch.stack([*exact.maxima[:2].to(device), tempered_max, exact.maxima[2].to(device)])
    maxima = torch.cat([maxima, exact.mean.float().to(device)[None]])
    scales = torch.zeros(5, 3, device=device)
    scales[3], scales[4] = 0.5 / tempered_sum, exact.scales[0].to(device)
    out = torch.empty_like(z)
    native.logit_gradient(
        z,
        t,
        labels,
        residuals=(TEACHER, TEMPERED),
        divergence=divergence,
        shard=shard,
        maxima=maxima,
        scales=scales,
        out=out,
    )
    torch.testing.assert_close(out.double().cpu(), exact.gradient - 0.5 * other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_the_number_of_threads(isa):
    force_isa(isa)
    threads = torch.get_num_threads()
    z, t = draw(37, 3001, torch.float32), draw(37, 3001, torch.float32, seed=1)
    labels = draw_labels(37, 3001)
    exact = exact_divergence(z, t, labels, TEACHER, 3001, DIVERGENCES["jsd"])
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sums(z, t, labels, TEACHER, DIVERGENCES["jsd"], exact))
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_isa("auto")
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
