"""Merge and masses per token in C++ and CUDA against PyTorch's: the same float64 operations."""

from __future__ import annotations

import itertools

import pytest
import torch
from native_formulas import DEVICES, DIVERGENCES, IGNORE, INF, MIXED, NAN, TEACHER, TEMPERED, UNIFORM, device_of

from qtarget_megatron.kernels import native, reference
from qtarget_megatron.loss.per_token import merge
from qtarget_megatron.statistics import MAX_RESIDUALS, StatisticsRequest, VocabularyShard

# More than the tokens that one CPU thread takes, and no multiple of a CUDA block's.
TOKENS, COLUMNS = 700, 5
RESIDUALS = ((), (MIXED,), (TEACHER, UNIFORM), (TEMPERED, (0.0, 0.3)))
FLAGS = ("collision", "residual_entropy", "residual_label")
DTYPES = (torch.float32, torch.float64)


# The instruction sets share one implementation.
@pytest.fixture(params=["scalar", *DEVICES[3:]], ids=lambda name: name.replace("scalar", "cpu"))
def device(request):
    yield from device_of(request)


def requests(residuals):
    for chosen in itertools.product((False, True), repeat=len(FLAGS)):
        for top_k in (0, 3):
            yield StatisticsRequest(residuals, top_k=top_k, **dict(zip(FLAGS, chosen, strict=True)))
    for name in ("reverse-kl", "jsd") if residuals else ():
        yield StatisticsRequest(residuals, divergence=DIVERGENCES[name])
        yield StatisticsRequest(residuals, True, 3, True, True, divergence=DIVERGENCES[name])


def draw(ranks, dtype):
    """Logits, teacher, labels; each of the first tokens is a special case, the others are usual ones."""
    generator = torch.Generator().manual_seed(ranks)
    z, t = (4 * torch.randn(ranks, TOKENS, COLUMNS, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.randint(ranks * COLUMNS, (TOKENS,), generator=generator)
    z[0, 0] = -INF  # an empty shard
    z[:, 1] = -INF  # nothing but empty shards
    z[0, 2], t[0, 2] = -INF, 9.0  # without a logit, with residual mass
    z[-1, 3, 0] = -INF
    t[-1, 4, 0] = -INF
    t[:, 5] = -INF
    z[0, 6, 1] = NAN
    t[-1, 7, 2] = NAN
    z[:, 8] += 3000  # far from 0, the ranks far from one another
    z[0, 9] -= 900
    t[-1, 10] += 900
    labels[11:200:3] = IGNORE
    z[:, 11] = NAN
    return z.to(dtype), t.to(dtype), labels


def partials_of(ranks, request, dtype):
    z, t, labels = draw(ranks, dtype)
    parts = [
        reference.partial_statistics(
            z[rank],
            t[rank],
            labels,
            request=request,
            shard=VocabularyShard(rank * COLUMNS, COLUMNS, IGNORE),
        )
        for rank in range(ranks)
    ]
    partials = torch.stack(parts)
    partials[-1, 12, 1] = NAN  # as the kernels show one: the maximum is finite
    return partials, labels != IGNORE


def test_masses_are_asked_for_once_they_are_known():
    request = StatisticsRequest()
    stats = merge(reference, *partials_of(1, request, torch.float64), request)
    assert stats.label_mass is None and stats.residual_mass is None and stats.trust is None
    with pytest.raises(ValueError, match="once the objective is evaluated"):
        _ = stats.total_mass


@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
@pytest.mark.parametrize("ranks", range(1, 9))
def test_the_merge_is_the_reference_s(device, ranks, residuals):
    for request, dtype in itertools.product(requests(residuals), DTYPES):
        partials, supervised = partials_of(ranks, request, dtype)
        exact = merge(reference, partials, supervised, request)
        got = merge(native, partials.to(device), supervised.to(device), request)
        count = request.merged_rows
        # Exponentials and logarithms of another library, and of the sums of 8 ranks another order; what is subtracted
        # from one another is up to 3000.
        torch.testing.assert_close(got.rows[:count].cpu(), exact.rows[:count], rtol=1e-13, atol=1e-12, equal_nan=True)
        usual = slice(200, None)
        torch.testing.assert_close(got.rows[:count, usual].cpu(), exact.rows[:count, usual], rtol=2e-14, atol=2e-14)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
def test_masses_and_scales_are_the_reference_s(device, residuals, dtype):
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(5 + MAX_RESIDUALS + 8, TOKENS, generator=generator, dtype=torch.float64)
    drawn[:, 20] = 0.0  # no mass: trust is NaN
    loss, label_mass, *others = drawn
    guards = others[-8:]
    guards[7][300] = NAN
    loss[301] = INF
    for request in requests(residuals):
        partials, supervised = partials_of(2, request, torch.float32)
        rows = merge(reference, partials, supervised, request).rows
        rows[-3:] = NAN
        if request.second_pass:
            rows[-5:-3] = drawn[:2]
        count = len(residuals) + (request.divergence is not None)
        masses = others[:count]
        for of_loss, of_label, of_residuals, guarded in (
            (loss, label_mass, masses, guards),
            (loss, 0.5, [0.25] * count, guards[:1]),
            (loss, label_mass, [0.0] * count, []),
            (None, label_mass, masses, guards),
            (None, 0.0, [0.25] * count, []),
            (None, label_mass, [0.0] * count, []),
        ):
            results = []
            for kernel, place in ((reference, "cpu"), (native, device)):
                own = rows.clone().to(place)

                def there(value, place=place):
                    return value.to(place) if isinstance(value, torch.Tensor) else value

                outputs = kernel.weigh(
                    own,
                    supervised.to(place),
                    request=request,
                    loss=there(of_loss),
                    label_mass=there(of_label),
                    residual_masses=[there(mass) for mass in of_residuals],
                    guards=[guard.to(place) for guard in guarded],
                    dtype=dtype,
                )
                results.append([value.cpu() for value in (own[-3:], *outputs)])
            assert results[0][1][300].isnan() == (guards[7] is guarded[-1] if guarded else False)
            for theirs, ours in zip(*results, strict=True):
                # Without a loss, and for a divergence, the kernel takes a logarithm, of another library: the last bit
                # of what is added up to 3000, or of the float32 that it is rounded to.
                takes_logarithm = of_loss is None or request.divergence is not None
                rtol, atol = (max(1e-13, torch.finfo(ours.dtype).eps), 1e-12) if takes_logarithm else (0, 0)
                torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_upstream_gradient_is_multiplied_in_as_the_reference_does(device, dtype):
    """Of a run of the tokens, as of a chunk, and of any stride; NaN does not leak where it is 0."""
    generator = torch.Generator().manual_seed(5)
    scales = torch.randn(4, 700, generator=generator, dtype=torch.float64)
    scales[1, 100:110] = NAN
    upstream = torch.randn(1400, generator=generator).to(dtype)
    upstream[200:216] = 0
    for given in (upstream[::2], upstream[:1].expand(700), upstream[:700]):
        for run in (slice(None), slice(90, 300)):
            expected = reference.chain(scales[:, run], given[run])
            found = native.chain(scales.to(device)[:, run], given.to(device)[run]).cpu()
            assert found.dtype == dtype
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert not native.chain(scales.to(device), torch.zeros(700, dtype=dtype, device=device)).any()


def test_a_nan_in_any_of_many_side_inputs_reaches_the_loss(device):
    """More of them than a kernel takes."""
    request = StatisticsRequest()
    partials, supervised = partials_of(1, request, torch.float32)
    rows = merge(reference, partials, supervised, request).rows.to(device)
    guards = [torch.zeros(TOKENS, dtype=torch.float64) for _ in range(12)]
    # Behind the special cases.
    at = range(300, 300 + len(guards))
    for index, guard in zip(at, guards, strict=True):
        guard[index] = NAN
    loss, *_ = native.weigh(
        rows,
        supervised.to(device),
        request=request,
        loss=torch.zeros(TOKENS, dtype=torch.float64, device=device),
        label_mass=1.0,
        residual_masses=[],
        guards=[guard.to(device) for guard in guards],
        dtype=torch.float32,
    )
    assert loss.cpu()[200:].isnan().nonzero()[:, 0].tolist() == [index - 200 for index in at]


def test_partials_of_any_stride_are_merged():
    """A copy of them is alive while it is read: as large as the C library gives back at once."""
    request = StatisticsRequest()
    partials = torch.rand(8, request.width, 200_000, generator=torch.Generator().manual_seed(1)).transpose(1, 2)
    supervised = torch.ones(200_000, dtype=torch.bool)
    expected = merge(reference, partials, supervised, request).rows[:-3]
    found = merge(native, partials, supervised, request).rows[:-3]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
