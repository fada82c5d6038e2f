"""The native kernels against float64 formulas, on every instruction set and device.

Bounds: float32 sums over V columns in blocks agree with float64 to a few 1e-7 relative; a gradient
is off by half a unit in the last place of its dtype besides.
"""

from __future__ import annotations

import pytest
import torch
from native_formulas import (
    DEVICES,
    DTYPES,
    IGNORE,
    INF,
    ISAS,
    MIXED,
    NAN,
    TEACHER,
    TEMPERED,
    UNIFORM,
    as_rows,
    assert_statistics,
    device_of,
    draw,
    draw_labels,
    exact_gradient,
    exact_statistics,
    force_isa,
    has_hardware_exponential,
    statistics,
)

from qtarget_megatron import _C
from qtarget_megatron.kernels import native
from qtarget_megatron.statistics import VocabularyShard

# Relative: rounding of the result, and float32's part of it.
RELATIVE = {dtype: torch.finfo(dtype).eps / 2 + 5e-7 for dtype in DTYPES}
# The hardware's exponential is off by 2 + |1.17 x| units in the last place at x, a unit being at most 2^-23 of it. The
# first part is within RELATIVE; the second is that of the rounded product x log2(e), which is the power of 2 that the
# hardware takes. (The CPU's exponential is good to one unit at any x.)
RELATIVE_PER_EXPONENT = 1.17 * 2**-23
RESIDUALS = ((), (UNIFORM,), (TEACHER,), (MIXED,), (TEMPERED,), (TEMPERED, (0.0, 0.5)))


@pytest.fixture(params=DEVICES)
def device(request):
    yield from device_of(request)


def gradient(z, t, labels, residuals, scales, out=None, vocab_start=0, valid=None):
    out = torch.full_like(z, 7.0) if out is None else out
    valid = z.shape[1] if valid is None else valid
    shard = VocabularyShard(vocab_start, valid, IGNORE)
    native.logit_gradient(z, t, labels, residuals=residuals, shard=shard, **as_rows(**scales), out=out)
    return out


def scales_for(partials, device="cpu"):
    """Scales as the loss makes them, for masses 1.25 (softmax), 0.75 (label), 0.5 (residuals)."""
    partials = partials.cpu().float()
    return {
        "max_": partials[:, 0].clone().to(device),
        "scale": (1.25 / partials[:, 1]).nan_to_num(posinf=0.0).to(device),
        "label_scale": torch.full((len(partials),), 0.75, device=device),
        "residual_max": partials[:, 4::4].T.contiguous().to(device),
        "residual_scale": (0.5 / partials[:, 5::4].T).nan_to_num(posinf=0.0).contiguous().to(device),
    }


def assert_gradient(got, expected, dtype):
    assert got.dtype == dtype
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-9
    bound = RELATIVE[dtype] * expected.value.abs() + smallest + 3e-7
    if has_hardware_exponential(got):
        bound += RELATIVE_PER_EXPONENT * expected.of_exponents
    excess = (got.double().cpu() - expected.value).abs() - bound
    assert excess.max() <= 0, f"{dtype}: off by {excess.max():.3g} more than the bound"


@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 33, 1000, 1031, 2061])
def test_both_kernels_match_float64_for_every_width_dtype_and_residual(device, columns, dtype, residuals):
    z, t = draw(3, columns, dtype, device), draw(3, columns, dtype, device, seed=1)
    labels = draw_labels(3, columns, device)
    exact = exact_statistics(z, t, labels, residuals, 0, columns)
    assert_statistics(statistics(z, t, labels, residuals), exact)
    scales = scales_for(exact, device)
    expected = exact_gradient(z, t, labels, residuals, 0, columns, scales)
    assert_gradient(gradient(z, t, labels, residuals, scales), expected, dtype)


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_teacher_has_a_dtype_of_its_own(device, dtype, teacher_dtype):
    residuals = (MIXED, TEACHER)
    z, t = draw(2, 1037, dtype, device), draw(2, 1037, teacher_dtype, device, seed=1)
    labels = draw_labels(2, 1037, device)
    exact = exact_statistics(z, t, labels, residuals, 0, 1037)
    assert_statistics(statistics(z, t, labels, residuals), exact)
    scales = scales_for(exact, device)
    expected = exact_gradient(z, t, labels, residuals, 0, 1037, scales)
    assert_gradient(gradient(z, t, labels, residuals, scales), expected, dtype)


@pytest.mark.parametrize("garbage", [NAN, INF, 6e4])
@pytest.mark.parametrize("offset", [0, 1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_unaligned_rows_never_touch_their_surroundings(device, dtype, offset, garbage):
    columns, valid, residuals = 1103, 1050, (MIXED, UNIFORM)

    def embed(matrix, margin, row_gap):
        wide = torch.full((matrix.shape[0], columns + row_gap), garbage, dtype=matrix.dtype, device=device)
        wide[:, margin : margin + columns] = matrix
        wide[:, margin + valid : margin + columns] = garbage  # padding columns
        return wide, wide[:, margin : margin + columns]

    z_plain, t_plain = draw(4, columns, dtype, device), draw(4, columns, dtype, device, seed=1)
    labels = draw_labels(4, valid, device)
    _, z = embed(z_plain, offset, 5)
    _, t = embed(t_plain, 2, 9)
    around, out = embed(torch.zeros_like(z_plain), 1 + offset, 7)
    exact = exact_statistics(z_plain, t_plain, labels, residuals, 0, valid)
    assert_statistics(statistics(z, t, labels, residuals, valid=valid), exact)
    scales = scales_for(exact, device)
    expected = exact_gradient(z_plain, t_plain, labels, residuals, 0, valid, scales)
    before = around.clone()
    gradient(z, t, labels, residuals, scales, out=out, valid=valid)
    assert_gradient(out, expected, dtype)
    assert (out[:, valid:] == 0).all(), "padding columns must be exact zeros"
    for outside in (slice(0, 1 + offset), slice(1 + offset + columns, None)):
        assert torch.equal(around[:, outside].nan_to_num(), before[:, outside].nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_in_place_equals_gradient_beside(device, dtype):
    residuals = (MIXED, TEMPERED)
    wide, t = draw(5, 2100, dtype, device), draw(5, 2077, dtype, device, seed=1)
    z = wide[:, 3:2080]
    labels = draw_labels(5, 2077, device)
    scales = scales_for(statistics(z, t, labels, residuals), device)
    beside = gradient(z, t, labels, residuals, scales)
    gradient(z, t, labels, residuals, scales, out=z)
    assert torch.equal(z, beside)


def test_ignored_rows_are_zero_and_never_read(device):
    residuals = (MIXED,)
    z, t = draw(4, 100, torch.float32, device), draw(4, 100, torch.float32, device, seed=1)
    labels = draw_labels(4, 100, device)
    labels[1] = IGNORE
    z[1], t[1] = NAN, NAN
    partials = statistics(z, t, labels, residuals)
    assert (partials[1] == 0).all() and partials.isfinite().all()
    scales = scales_for(partials, device)
    scales["scale"][1] = NAN
    grad = gradient(z, t, labels, residuals, scales)
    assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


def test_rows_whose_scales_are_zero_get_zero_gradient_whatever_they_hold(device):
    z, t = torch.full((2, 50), NAN, device=device), torch.full((2, 50), INF, device=device)
    zeros = {name: torch.zeros(2, device=device) for name in ("max_", "scale", "label_scale")}
    pair = {name: torch.zeros(2, 2, device=device) for name in ("residual_max", "residual_scale")}
    labels = draw_labels(2, 50, device)
    assert (gradient(z, t, labels, (MIXED, UNIFORM), {**zeros, **pair}) == 0).all()


def test_residual_of_scale_zero_is_left_out(device):
    z, t = draw(2, 77, torch.float32, device), torch.full((2, 77), NAN, device=device)
    labels = draw_labels(2, 77, device)
    scales = scales_for(statistics(z, None, labels, ()), device)
    alone = gradient(z, None, labels, (), scales)
    scales |= {name: torch.zeros(1, 2, device=device) for name in ("residual_max", "residual_scale")}
    assert torch.equal(gradient(z, t, labels, (TEACHER,), scales), alone)


@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
def test_labels_of_other_shards_have_no_logit_and_no_label_term(device, residuals):
    start, columns, valid = 1000, 64, 60
    z, t = draw(5, columns, torch.float32, device), draw(5, columns, torch.float32, device, seed=1)
    # Before the shard, its first and last valid column, its padding, after it.
    labels = torch.tensor([999, 1000, 1059, 1060, 2**40], device=device)
    exact = exact_statistics(z, t, labels, residuals, start, valid)
    got = statistics(z, t, labels, residuals, start, valid)
    assert_statistics(got, exact)
    assert torch.equal(got[:, 3].cpu(), torch.tensor([0, z[1, 0].item(), z[2, 59].item(), 0, 0]))
    scales = scales_for(exact, device)
    expected = exact_gradient(z, t, labels, residuals, start, valid, scales)
    assert_gradient(gradient(z, t, labels, residuals, scales, vocab_start=start, valid=valid), expected, z.dtype)


@pytest.mark.parametrize("columns", [4, 40, 3000])
@pytest.mark.parametrize("residuals", RESIDUALS, ids=str)
def test_minus_infinite_logits_have_no_weight(device, residuals, columns):
    z, t = draw(3, columns, torch.float32, device), draw(3, columns, torch.float32, device, seed=1)
    z[:, ::2] = -INF  # the first block of a row may hold nothing else
    z[1, : columns * 3 // 4] = -INF
    z[2, : columns // 2] = torch.finfo(torch.float32).min
    t[:, ::2] = -INF
    t[1, : columns * 3 // 4] = -INF
    t[2, : columns // 2] = -INF
    labels = torch.full((3,), columns - 1, device=device)
    exact = exact_statistics(z, t, labels, residuals, 0, columns)
    assert_statistics(statistics(z, t, labels, residuals), exact)
    scales = scales_for(exact, device)
    got = gradient(z, t, labels, residuals, scales)
    assert_gradient(got, exact_gradient(z, t, labels, residuals, 0, columns, scales), z.dtype)


@pytest.mark.parametrize("residual", [UNIFORM, TEACHER])
def test_residual_mass_on_a_minus_infinite_logit_makes_the_mean_logit_minus_infinite(device, residual):
    for column in (0, 13, 1999):
        z, t = draw(1, 2000, torch.float32, device), draw(1, 2000, torch.float32, device, seed=1)
        z[0, column] = -INF
        got = statistics(z, t, draw_labels(1, 2000, device), (residual,))[0]
        assert got[6] == -INF and got[:6].isfinite().all() and got[7].isfinite()


def test_a_shard_without_finite_logits_is_empty_not_nan(device):
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    for columns, valid in ((5, 0), (5, 5), (3000, 3000)):
        z = torch.full((1, columns), -INF, device=device)
        t = draw(1, columns, torch.float32, device)
        got = statistics(z, t, labels, (TEMPERED, TEACHER), vocab_start=5, valid=valid)[0]
        assert got[:8].tolist() == [-INF, 0, 0, 0, -INF, 0, 0, 0]
        # The teacher has mass here while the student has no centre: x_u is left to the merge.
        assert got[10] == 0 and (got[9] > 0) == (valid > 0)


@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_nan_or_infinite_logit_anywhere_shows_in_the_sum(device, dtype, poison):
    for columns in (1, 7, 2085):
        for column in {0, columns // 2, columns - 1}:
            z, t = draw(3, columns, dtype, device), draw(3, columns, dtype, device, seed=1)
            z[1, column] = poison
            t[2, column] = poison
            labels = torch.zeros(3, dtype=torch.int64, device=device)
            got = statistics(z, t, labels, (MIXED, UNIFORM)).cpu()
            assert got[:, 1].isnan().tolist() == [False, True, False], (columns, column)
            assert got[:, 5].isnan().tolist() == [False, True, True], (columns, column)
            assert got[0].isfinite().all()
            # A row of -inf besides must not hide it.
            z[1] = -INF
            z[1, column] = poison
            assert statistics(z, t, labels, ())[1, 1].isnan(), (columns, column)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_reaches_the_gradient(device, dtype):
    columns = 1031
    for column in (0, 500, 1030):
        z, t = draw(2, columns, dtype, device), draw(2, columns, dtype, device, seed=1)
        labels = torch.zeros(2, dtype=torch.int64, device=device)
        scales = scales_for(statistics(z, t, labels, (MIXED,)), device)
        z[0, column] = NAN
        t[1, column] = NAN
        bad = gradient(z, t, labels, (MIXED,), scales).isnan()
        assert bad[:, column].all() and bad.sum() == 2
        scales["scale"][0] = NAN  # what a NaN row's sum makes of the scale
        assert gradient(z, t, labels, (MIXED,), scales)[0].isnan().all()


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets_cost_no_precision(device, offset):
    residuals = (MIXED, TEMPERED)
    # Multiples of 1/64 survive the offset exactly.
    z = (draw(3, 5000, torch.float32) * 64).round().div(64).to(device) + offset
    t = (draw(3, 5000, torch.float32, seed=1) * 64).round().div(64).to(device) + offset
    labels = draw_labels(3, 5000, device)
    got = statistics(z, t, labels, residuals).double().cpu()
    exact = exact_statistics(z, t, labels, residuals, 0, 5000)
    torch.testing.assert_close(got[:, :4], exact[:, :4], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[:, 4::4], exact[:, 4::4], rtol=1e-7, atol=0)
    # MIXED is exact here: 0.5 z + 0.5 t.
    torch.testing.assert_close(got[:, 5:8], exact[:, 5:8], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 2.0, 8.0])
def test_loss_and_entropy_at_151936_columns_match_float64(device, spread):
    columns = 151936
    z, t = (
        draw(2, columns, torch.float32, device, spread),
        draw(2, columns, torch.float32, device, spread, seed=1),
    )
    labels = draw_labels(2, columns, device)
    got = statistics(z, t, labels, (MIXED,)).double().cpu()
    log_p = torch.log_softmax(z.double().cpu(), -1)
    r = torch.softmax(0.5 * z.double().cpu() + 0.5 * t.double().cpu(), -1)
    nll = got[:, 0] - got[:, 3] + got[:, 1].log()
    torch.testing.assert_close(nll, -log_p.gather(1, labels.cpu()[:, None])[:, 0], rtol=1e-6, atol=0)
    entropy = got[:, 1].log() - got[:, 2] / got[:, 1]
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=1e-6, atol=0)
    cross_entropy = got[:, 1].log() - got[:, 6] / got[:, 5]
    torch.testing.assert_close(cross_entropy, -(r * log_p).sum(-1), rtol=1e-6, atol=0)
    residual_entropy = got[:, 5].log() - got[:, 7] / got[:, 5]
    torch.testing.assert_close(residual_entropy, -(r * r.log()).sum(-1), rtol=1e-6, atol=0)


def test_equal_terms_cancel_to_exactly_zero(device):
    for dtype in DTYPES:
        z = draw(2, 1111, dtype, device)
        labels = draw_labels(2, 1111, device)
        partials = statistics(z, z, labels, (TEACHER,))
        scales = scales_for(partials, device)
        scales |= {
            "residual_scale": scales["scale"][None].clone(),
            "label_scale": torch.zeros(2, device=device),
        }
        assert (gradient(z, z.clone(), labels, (TEACHER,), scales) == 0).all()


def test_no_rows(device):
    z, labels = torch.empty(0, 100, device=device), torch.empty(0, dtype=torch.int64, device=device)
    partials = statistics(z, z, labels, (MIXED,))
    assert partials.shape == (0, 8)
    assert gradient(z, z, labels, (MIXED,), scales_for(partials, device)).shape == (
        0,
        100,
    )


def test_results_do_not_depend_on_the_run(device):
    z, t = draw(64, 3001, torch.bfloat16, device), draw(64, 3001, torch.bfloat16, device, seed=1)
    labels = draw_labels(64, 3001, device)
    partials = [statistics(z, t, labels, (MIXED, TEMPERED)) for _ in range(3)]
    scales = scales_for(partials[0], device)
    gradients = [gradient(z, t, labels, (MIXED, TEMPERED), scales) for _ in range(3)]
    assert all(torch.equal(again, partials[0]) for again in partials)
    assert all(torch.equal(again, gradients[0]) for again in gradients)


@pytest.mark.parametrize("isa", ISAS)
def test_results_do_not_depend_on_the_number_of_threads(isa):
    force_isa(isa)
    threads = torch.get_num_threads()
    z, t = draw(37, 3001, torch.float32), draw(37, 3001, torch.float32, seed=1)
    labels = draw_labels(37, 3001)
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            partials = statistics(z, t, labels, (MIXED,))
            grad = gradient(z, t, labels, (MIXED,), scales_for(partials))
            results.append(torch.cat([partials, grad], 1))
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_isa("auto")
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_gradients_round_like_torch(device, dtype):
    # exp(0) * scale writes any float32: ties, float16's subnormals and overflow show.
    ties = [1.00390625, 1.01171875, 1.00048828125, 65504.0, 65520.0]
    values = torch.tensor([*ties, 3e-8, 6.1e-5, 6.1035153e-5, 1.2e-38, -7e-6, 1e30])
    # The NaN that GPUs make: rounding it up would carry into the sign and leave -0.
    nans = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    small, large = draw(1, 500, torch.float32, spread=1e-3)[0], draw(1, 500, torch.float32)[0]
    rows = torch.cat([values, nans, small, large])
    count = len(rows)
    z = torch.zeros(count, 9, dtype=dtype, device=device)
    zeros = torch.zeros(count, device=device)
    scales = {"max_": zeros, "scale": rows.to(device), "label_scale": zeros}
    labels = torch.zeros(count, dtype=torch.int64, device=device)
    got = gradient(z, None, labels, (), scales)
    expected = rows.to(dtype)[:, None].expand(count, 9)
    torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_gradients_below_the_normal_numbers_are_0_or_right(device):
    for dtype in DTYPES:
        z, zeros = torch.zeros(3, 70, dtype=dtype, device=device), torch.zeros(3, device=device)
        scale = torch.tensor([9e-41, -1e-40, 1.1e-38], device=device)
        scales = {"max_": zeros, "scale": scale, "label_scale": zeros}
        got = gradient(z, None, torch.zeros(3, dtype=torch.int64, device=device), (), scales)
        rounded = scale.to(dtype)[:, None].expand(3, 70)
        assert ((got == 0) | (got == rounded)).all(), dtype


@pytest.mark.parametrize("distance", [80, 87.2, 88, 95, 103.5, 120, 1e4, 3e38])
def test_logits_far_below_the_maximum_have_a_weight_of_next_to_nothing(device, distance):
    for dtype, residuals in ((torch.float32, ()), (torch.float32, (TEMPERED, TEACHER)), (torch.bfloat16, (TEACHER,))):
        z = torch.full((2, 301), -float(distance), dtype=dtype, device=device)
        z[:, 7] = 0.0
        labels = torch.full((2,), 7, device=device)
        exact = exact_statistics(z, z, labels, residuals, 0, 301)
        assert_statistics(statistics(z, z, labels, residuals), exact)
        scales = scales_for(exact, device)
        got = gradient(z, z, labels, residuals, scales)
        assert_gradient(got, exact_gradient(z, z, labels, residuals, 0, 301, scales), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_rise_from_block_to_block_match_float64(device, dtype):
    # By less and by more than what the sums of a block bear without a new centre.
    for rise in (1.0, 7.0, 9.0, 60.0, -60.0):
        steps = torch.arange(7).repeat_interleave(1024)[:7000] * rise / 4
        z, t = draw(2, 7000, torch.float32, spread=0.5), draw(2, 7000, torch.float32, spread=0.5, seed=1)
        z, t = (z + steps).to(dtype).to(device), (t - steps).to(dtype).to(device)
        labels = draw_labels(2, 7000, device)
        for residuals in ((TEACHER, (1.0, -0.5)), (MIXED, UNIFORM)):
            assert_statistics(statistics(z, t, labels, residuals), exact_statistics(z, t, labels, residuals, 0, 7000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_residuals_of_negative_coefficients_match_float64(device, dtype):
    for columns in (5, 1000, 2061):
        z, t = draw(2, columns, dtype, device), draw(2, columns, dtype, device, seed=1)
        labels = draw_labels(2, columns, device)
        for residuals in (((-1.0, 0.0), (0.0, -1.0)), ((-0.5, 1.0), (2.0, -1.0)), ((-1.0, -1.0),)):
            exact = exact_statistics(z, t, labels, residuals, 0, columns)
            assert_statistics(statistics(z, t, labels, residuals), exact)
            scales = scales_for(exact, device)
            expected = exact_gradient(z, t, labels, residuals, 0, columns, scales)
            assert_gradient(gradient(z, t, labels, residuals, scales), expected, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gradients_written_past_the_caches_are_those_of_small_ones(isa, dtype):
    rows, columns, gap = 66, 140003, 3  # above 16 MiB in every dtype; rows begin at any address
    force_isa(isa)
    try:
        z, t = draw(rows, columns, dtype), draw(rows, columns, dtype, seed=1)
        labels, residuals = draw_labels(rows, columns), (MIXED,)
        scales = scales_for(statistics(z, t, labels, residuals))
        around = torch.full((rows, columns + gap), 7.0, dtype=dtype)
        gradient(z, t, labels, residuals, scales, out=around[:, 1 : 1 + columns])
        assert (around[:, 0] == 7).all() and (around[:, 1 + columns :] == 7).all()
        for row in range(0, rows, 5):
            one = slice(row, row + 1)
            of_row = {name: value[..., one].contiguous() for name, value in scales.items()}
            small = gradient(z[one], t[one], labels[one], residuals, of_row)
            assert torch.equal(around[one, 1 : 1 + columns], small), row
    finally:
        _C.set_cpu_isa("auto")


@pytest.mark.parametrize("isa", ISAS)
def test_the_mode_of_subnormal_numbers_is_the_caller_s_again(isa):
    force_isa(isa)
    tiny = torch.tensor(1e-40)
    try:
        z, labels = draw(3, 2000, torch.float32), draw_labels(3, 2000)
        statistics(z, z, labels, (MIXED,), top_k=20, collision=True)
        scales = scales_for(statistics(z, z, labels, (MIXED,)))
        gradient(z, z, labels, (MIXED,), scales)
        assert (tiny * 1.0 == tiny) and (tiny + 0.0).item() > 0
    finally:
        _C.set_cpu_isa("auto")
