"""The statistics that are computed on request only: collision, largest logits, residual entropy and label.

On every instruction set and device, against float64 formulas.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
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
    columns_of,
    device_of,
    draw,
    draw_labels,
    exact_statistics,
    force_isa,
    request_of,
    statistics,
)

from qtarget_megatron import _C
from qtarget_megatron.kernels import native, reference
from qtarget_megatron.statistics import VocabularyShard

ALL = dict(collision=True, top_k=20, residual_entropy=True, residual_label=True, divergence=DIVERGENCES["reverse-kl"])
PAIRS = ((MIXED, UNIFORM), (TEMPERED, TEACHER))


@pytest.fixture(params=DEVICES)
def device(request):
    yield from device_of(request)


def assert_extras(got, exact, residuals, **wanted):
    """Compares what was asked for beyond m, s, e, z_y and m_u, s_u, x_u; the logits among it exactly."""
    assert got.dtype == torch.float32 and got.shape == exact.shape
    got, columns = got.double().cpu(), columns_of(residuals, **wanted)
    torch.testing.assert_close(got[:, columns["c"]], exact[:, columns["c"]], rtol=2e-6, atol=0)
    assert torch.equal(got[:, columns["top"]], exact[:, columns["top"]])
    for index in range(len(residuals)):
        t_y = columns["t_y", index]
        assert torch.equal(got[:, t_y], exact[:, t_y])
        if wanted.get("residual_entropy", True):
            s_u, h_u = columns["s_u", index], columns["h_u", index]
            means = [torch.where(part[:, s_u] == 0, 0.0, part[:, h_u] / part[:, s_u]) for part in (got, exact)]
            torch.testing.assert_close(*means, rtol=2e-6, atol=3e-6)
    if "divergence" in wanted:
        # Centred on an m_u that is rounded.
        s, y, m_u = slice(1, 2), columns["y"], columns["m_u", 0]
        means = [torch.where(part[:, s] == 0, 0.0, part[:, y] / part[:, s] + part[:, m_u]) for part in (got, exact)]
        torch.testing.assert_close(*means, rtol=2e-6, atol=3e-6)


def largest(z, k, labels=None, valid=None):
    labels = torch.zeros(z.shape[0], dtype=torch.int64, device=z.device) if labels is None else labels
    return statistics(z, None, labels, (), valid=valid, top_k=k)[:, 4:]


@pytest.mark.parametrize("residuals", PAIRS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 3, 8, 33, 1000, 1031, 5001])
def test_every_extra_matches_float64(device, columns, dtype, residuals):
    z, t = draw(3, columns, dtype, device), draw(3, columns, dtype, device, seed=1)
    labels = draw_labels(3, columns, device)
    for k in (1, 20, 64, columns):  # of which some exceed the number of columns
        wanted = ALL | {"top_k": k}
        exact = exact_statistics(z, t, labels, residuals, 0, columns, **wanted)
        assert_extras(statistics(z, t, labels, residuals, **wanted), exact, residuals, **wanted)


@pytest.mark.parametrize("residuals", [(), (MIXED,), (TEACHER, UNIFORM)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_extra_changes_no_other_column(device, dtype, residuals):
    z, t = draw(3, 3003, dtype, device), draw(3, 3003, dtype, device, seed=1)
    labels = draw_labels(3, 3003, device)
    every = ALL if residuals else ALL | {"divergence": None}
    whole = statistics(z, t, labels, residuals, **every)
    of_whole = columns_of(residuals, **every)
    for chosen in itertools.product((False, True), repeat=len(every)):
        wanted = {name: value if on else None for on, (name, value) in zip(chosen, every.items(), strict=True)}
        wanted |= {name: every[name] * 0 for name, value in wanted.items() if value is None and name != "divergence"}
        got = statistics(z, t, labels, residuals, **wanted)
        assert got.shape[1] == request_of(residuals, **wanted).width
        for name, columns in columns_of(residuals, **wanted).items():
            if columns.start < columns.stop:
                assert torch.equal(got[:, columns], whole[:, of_whole[name]]), (name, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_is_the_reference_s(device, dtype):
    z, t = draw(3, 501, dtype, device), draw(3, 501, dtype, device, seed=1)
    labels = draw_labels(3, 501, device)
    labels[1] = IGNORE
    for residuals, collision, k, entropy, label in itertools.product(PAIRS, (0, 1), (0, 7, 600), (0, 1), (0, 1)):
        request = request_of(
            residuals, collision=bool(collision), top_k=k, residual_entropy=bool(entropy), residual_label=bool(label)
        )
        arguments = dict(request=request, shard=VocabularyShard(0, 490, IGNORE))
        ours, theirs = (module.partial_statistics(z, t, labels, **arguments) for module in (native, reference))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.01, 3.0, 30.0])
def test_collision_at_151936_columns_matches_float64(device, spread):
    z = draw(2, 151936, torch.float32, device, spread)
    got = statistics(z, None, draw_labels(2, 151936, device), (), collision=True).double().cpu()
    exact = torch.softmax(z.double().cpu(), -1).square().sum(-1)
    torch.testing.assert_close(got[:, 4] / got[:, 1] ** 2, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("order", ["ascending", "descending"])
@pytest.mark.parametrize("ends", [(-60, 40), (1, 1.001)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sorted_rows_raise_the_maximum_in_every_block_or_never(device, dtype, ends, order):
    z = torch.linspace(*ends, 5003).to(dtype)[None]
    z = (z if order == "ascending" else z.flip(1)).to(device)
    labels = draw_labels(1, 5003, device)
    for k in (1, 20, 64, 700, 5003):
        wanted = dict(collision=True, top_k=k)
        exact = exact_statistics(z, None, labels, (), 0, 5003, **wanted)
        assert_extras(statistics(z, None, labels, (), **wanted), exact, (), **wanted)


@pytest.mark.parametrize("k", [1, 20, 64, 3000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_logits_count_separately(device, dtype, k):
    ties = torch.full((1, 3000), 1.5, dtype=dtype, device=device)
    assert (largest(ties, k) == 1.5).all()
    # Two values above a plateau that is longer than k, one of them late.
    ties[0, 5], ties[0, 2999] = 2.0, 3.0
    expected = [3.0, 2.0, *[1.5] * k][:k]
    assert largest(ties, k)[0].tolist() == expected
    few = torch.randint(-2, 3, (2, 3000)).to(dtype).to(device)
    assert torch.equal(largest(few, k), few.float().sort(descending=True).values[:, :k])


def test_subnormal_logits_have_an_order_too(device):
    z = torch.tensor([-2e-40, 0.0, 1e-40, 3e-40]).repeat(700)[None].to(device)
    for k in (1, 20, 64, 1500):
        assert torch.equal(largest(z, k).cpu(), z.cpu().sort(descending=True).values[:, :k])
        assert torch.equal(largest(z.flip(1) - 1e-38, k).cpu(), (z - 1e-38).cpu().sort(descending=True).values[:, :k])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fewer_logits_than_k_are_padded_with_minus_infinity(device, dtype):
    z = draw(2, 40, dtype, device)
    z[1, 3:] = -INF
    got = largest(z, 64)
    assert torch.equal(got[:, :40], z.float().sort(descending=True).values)
    assert (got[:, 40:] == -INF).all() and (got[1, 3:] == -INF).all()
    assert (largest(z, 5, valid=0) == -INF).all()


@pytest.mark.parametrize("isa", ISAS)
@given(
    values=st.lists(st.floats(width=16, allow_nan=False) | st.sampled_from([0.0, -0.0, 1.0, INF, -INF]), min_size=1),
    repeat=st.integers(1, 60),
    k=st.integers(1, 70),
)
def test_largest_of_any_row_is_the_head_of_the_sorted_row(isa, values, repeat, k):
    row = torch.tensor(values, dtype=torch.float32).repeat(repeat)[None]
    expected = row.sort(descending=True).values[:, :k]
    expected = torch.nn.functional.pad(expected, (0, k - expected.shape[1]), value=-INF)
    force_isa(isa)
    try:
        assert torch.equal(largest(row, k), expected)
    finally:
        _C.set_cpu_isa("auto")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_never_among_the_largest_on_the_cpu_but_in_the_sum(isa, dtype):
    force_isa(isa)
    try:
        z = draw(2, 2085, dtype)
        expected = z.float().sort(descending=True).values[1]
        clean = z[0].float().clone()
        for column in (0, 1000, 2084):
            z[0, column] = NAN
            got = statistics(z, None, draw_labels(2, 2085), (), collision=True, top_k=64)
            kept = torch.cat([clean[:column], clean[column + 1 :]]).sort(descending=True).values
            assert got[0, 1].isnan() and got[0, 4].isnan() and got[1].isfinite().all()
            assert torch.equal(got[0, 5:], kept[:64]) and torch.equal(got[1, 5:], expected[:64])
            z[0, column] = clean[column]
        short = torch.tensor([[1.0, NAN, 3.0, NAN]], dtype=dtype)
        assert largest(short, 5).tolist() == [[3.0, 1.0, -INF, -INF, -INF]]
    finally:
        _C.set_cpu_isa("auto")


def test_an_infinite_logit_is_the_largest(device):
    z = draw(1, 2085, torch.float32, device)
    z[0, 1234] = INF
    got = statistics(z, None, draw_labels(1, 2085, device), (), top_k=3)[0].tolist()
    assert got[4] == INF and got[5] == z[z < INF].max() and got[1] != got[1]


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_large_offsets_cost_no_precision(device, offset):
    # Multiples of 1/64 survive the offset exactly.
    z = (draw(3, 5001, torch.float32) * 64).round().div(64).to(device) + offset
    t = (draw(3, 5001, torch.float32, seed=1) * 64).round().div(64).to(device) + offset
    labels = draw_labels(3, 5001, device)
    for residuals in ((MIXED,), (TEACHER,)):
        exact = exact_statistics(z, t, labels, residuals, 0, 5001, **ALL)
        assert_extras(statistics(z, t, labels, residuals, **ALL), exact, residuals, **ALL)


@pytest.mark.parametrize("garbage", [NAN, INF, 6e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_and_surroundings_never_enter(device, dtype, garbage):
    columns, valid, residuals = 1103, 1050, (MIXED,)
    plain, t = draw(4, columns, dtype, device), draw(4, columns, dtype, device, seed=1)
    wide = torch.full((4, columns + 5), garbage, dtype=dtype, device=device)
    wide[:, 3 : 3 + valid] = plain[:, :valid]
    t[:, valid:] = garbage
    labels = draw_labels(4, valid, device)
    for k in (20, 1060):
        wanted = ALL | {"top_k": k}
        exact = exact_statistics(plain, t, labels, residuals, 0, valid, **wanted)
        got = statistics(wide[:, 3 : 3 + columns], t, labels, residuals, valid=valid, **wanted)
        assert_extras(got, exact, residuals, **wanted)


def test_ignored_rows_are_zero_and_never_read(device):
    z, t = draw(4, 100, torch.float32, device), draw(4, 100, torch.float32, device, seed=1)
    labels = draw_labels(4, 100, device)
    labels[1] = IGNORE
    z[1], t[1] = NAN, NAN
    got = statistics(z, t, labels, (MIXED,), **(ALL | {"top_k": 300}))
    assert (got[1] == 0).all() and not got.isnan().any() and (got[0] != 0).all()


def test_labels_of_other_shards_have_no_residual_logit(device):
    start, valid, residuals = 1000, 60, (MIXED, TEACHER)
    z, t = draw(5, 64, torch.float32, device), draw(5, 64, torch.float32, device, seed=1)
    # Before the shard, its first and last valid column, its padding, after it.
    labels = torch.tensor([999, 1000, 1059, 1060, 2**40], device=device)
    got = statistics(z, t, labels, residuals, start, valid, residual_entropy=False, residual_label=True).cpu()
    t = t.cpu()
    for index in range(len(residuals)):
        t_y = got[:, columns_of(residuals, residual_entropy=False, residual_label=True)["t_y", index]]
        assert t_y[:, 0].tolist() == [0, t[1, 0], t[2, 59], 0, 0]


def test_a_shard_without_finite_logits_has_no_extras(device):
    labels = torch.zeros(1, dtype=torch.int64, device=device)
    for columns, valid in ((5, 0), (5, 5), (3000, 3000)):
        z = torch.full((1, columns), -INF, device=device)
        got = statistics(z, z, labels, (TEACHER,), vocab_start=5, valid=valid, **ALL)[0].tolist()
        assert got == [-INF, 0, 0, 0, 0, *[-INF] * 20, -INF, 0, 0, 0, 0, 0]


def test_a_removed_operand_leaves_the_label_s_residual_finite(device):
    z, t = draw(1, 50, torch.float32, device), draw(1, 50, torch.float32, device, seed=1)
    z[0, 7] = -INF
    label = torch.tensor([7], device=device)
    got = statistics(z, t, label, (UNIFORM, TEACHER), residual_entropy=False, residual_label=True)[0]
    assert got[7] == 0 and got[11] == t[0, 7] and got[3] == -INF


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
            results.append(statistics(z, t, labels, (MIXED,), **ALL))
    finally:
        torch.set_num_threads(threads)
        _C.set_cpu_isa("auto")
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("k", [1, 20, 150])
def test_top_k_of_the_gpu_path_has_the_same_layout(k):
    z = draw(3, 100, torch.bfloat16)
    out = torch.full((3, k), NAN)
    native.write_top_k(z[:, :90], torch.tensor([True, False, True]), out)
    assert (out[1] == 0).all()
    assert torch.equal(out[[0, 2]], largest(z[[0, 2]], k, valid=90))
