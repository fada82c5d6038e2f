"""The emulated CUDA kernels in random cases, every matrix next to memory that is not there.

Besides the definition in float64 they are held to what the emulator looks for: threads run in random order,
multiply-adds are fused, and an access outside of a matrix, or one that is not aligned, is an error.
"""

from __future__ import annotations

import ctypes
import mmap
import random

import emulated_kernels
import pytest
import torch
from native_formulas import (
    DIVERGENCES,
    DTYPES,
    IGNORE,
    INF,
    MIXED,
    NAN,
    TEACHER,
    TEMPERED,
    UNIFORM,
    as_rows,
    columns_of,
    exact_divergence,
    exact_gradient,
    exact_statistics,
    statistics,
)

from qtarget_megatron.kernels import native
from qtarget_megatron.statistics import VocabularyShard, kernel_coefficients

pytestmark = pytest.mark.slow

PROT_NONE = 0  # of <sys/mman.h>, which mmap leaves out
CASES, PER_TEST = 2000, 200
WIDTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 255, 257, 1000, 1031, 2047, 2049, 4096, 5003]
RESIDUALS = [(), (UNIFORM,), (TEACHER,), (MIXED,), (TEMPERED,), (TEMPERED, (0.0, 0.5)), (MIXED, TEACHER)]
RESIDUALS += [(UNIFORM, (0.3, 0.7)), ((0.5, 0.0), (2.0, 0.0)), ((-0.5, 1.0),)]


class GuardedMemory:
    """Room for a matrix between two pages that fault when touched."""

    def __init__(self, size: int):
        page = mmap.PAGESIZE
        self._first, self._end = page, (size // page + 2) * page
        self._memory = mmap.mmap(-1, self._end + page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        for guard in (start, start + self._end):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), PROT_NONE) == 0

    def place(self, values, stride, touched, at_end):
        """Rows of values with that stride, NaN between them; all but the touched columns of the last may be guarded."""
        rows, columns = values.shape
        count, size = (rows - 1) * stride + touched, values.element_size()
        start = self._end - count * size if at_end else self._first
        flat = torch.frombuffer(self._memory, dtype=values.dtype)[start // size :]
        flat[:count] = NAN
        placed = flat.as_strided((rows, columns), (stride, 1))
        placed[:, :touched] = values[:, :touched]
        return placed, flat[:count]


@pytest.fixture(scope="module")
def memory():
    return {name: GuardedMemory(5 * 9100 * 4) for name in ("z", "t", "out")}


@pytest.fixture
def emulated(emulated_module):
    with emulated_kernels.in_place_of_the_cpu_s(emulated_module):
        yield emulated_module


def assert_close(got, exact, relative, absolute, what):
    bad = ~((got - exact).abs() <= absolute + relative * exact.abs()) & (got != exact) & ~(got.isnan() & exact.isnan())
    assert not bad.any(), f"{what}: {got[bad][:3].tolist()}, expected {exact[bad][:3].tolist()}"


def assert_statistics(got, exact, residuals, **wanted):
    """Sums of up to 9000 float32 terms, each off by the exponential's 2 + |1.17 x| units in the last place."""
    got, columns = got.double(), columns_of(residuals, **wanted)
    assert torch.equal(got[:, [0, 3]], exact[:, [0, 3]])
    assert_close(got[:, 1], exact[:, 1], 2e-6, 0, "s")
    assert_close(got[:, 2], exact[:, 2], 4e-6, 2e-6, "e")
    assert_close(got[:, columns["c"]], exact[:, columns["c"]], 4e-6, 0, "c")
    for index in range(len(residuals)):
        m_u, s_u, x_u, h_u, t_y = (columns[name, index] for name in ("m_u", "s_u", "x_u", "h_u", "t_y"))
        assert torch.equal(got[:, t_y], exact[:, t_y])
        # m_u is rounded and centres s_u and h_u: compare what the merge makes of them.
        made = []
        for part in (got, exact):
            log_sum = part[:, s_u].log()
            mean_z, mean_u = (torch.where(part[:, s_u] == 0, 0.0, part[:, c] / part[:, s_u]) for c in (x_u, h_u))
            made.append((part[:, m_u] + log_sum, mean_z, (log_sum - mean_u)[:, : mean_u.shape[1]]))
        for name, ours, true in zip(("log-sum-exp", "mean of z", "entropy"), *made, strict=True):
            assert_close(ours, true, 5e-6 if name != "log-sum-exp" else 0, 5e-6, name)


def check(seed, memory):
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    dtype, teacher_dtype, rows = rng.choice(DTYPES), rng.choice(DTYPES), rng.choice([1, 1, 2, 3, 5])
    columns = rng.choice([*WIDTHS, rng.randint(1, 9000)])
    valid = rng.choice([columns, columns, columns, columns - 1, max(columns - rng.randint(0, 40), 0)])
    residuals, start = kernel_coefficients(rng.choice(RESIDUALS), torch.float32), rng.choice([0, 0, 1000, 10**9])
    wanted = {name: rng.random() < 0.5 for name in ("collision", "residual_entropy", "residual_label")}

    def draw(spread, offset, infinite, of_dtype):
        values = torch.randn(rows, columns, generator=generator) * spread + offset
        values[torch.rand(rows, columns, generator=generator) < infinite] = -INF
        return values.to(of_dtype)

    def place(name, values, touched, gaps=(0, 0, 1, 3, 8, 64)):
        return memory[name].place(values, columns + rng.choice(gaps), touched, at_end=rng.random() < 0.7)

    # Of -inf at the same place in both, u is -inf: it must not be that of opposite signs.
    infinite = rng.choice([0, 0, 0, 0.1, 0.9]) if all(a >= 0 for a, _ in residuals) else 0
    z_values = draw(rng.choice([0.01, 1.0, 3.0, 10.0, 40.0]), rng.choice([0, 0, 500, -500]), infinite, dtype)
    t_values = draw(rng.choice([0.5, 3.0, 20.0]), 0, rng.choice([0, 0, 0.3]), teacher_dtype)
    ids = [start + rng.randrange(columns), IGNORE, start - 1, start + columns, 2**40]
    labels = torch.tensor(rng.choices(ids, weights=[6, 1, 1, 1, 1], k=rows))

    z, _ = place("z", z_values, valid)
    t, _ = place("t", t_values, valid)
    exact = exact_statistics(z_values, t_values, labels, residuals, start, valid, **wanted)
    assert_statistics(statistics(z, t, labels, residuals, start, valid, **wanted), exact, residuals, **wanted)

    whole = exact_statistics(z_values, t_values, labels, residuals, start, valid)
    scales = {
        "max_": whole[:, 0].nan_to_num(neginf=0.0),
        "scale": (1.25 / whole[:, 1]).nan_to_num(posinf=0.0) * (rng.random() < 0.8),
        "label_scale": torch.full((rows,), 0.75) * (rng.random() < 0.8),
        "residual_max": whole[:, 4::4].T.nan_to_num(neginf=0.0),
        "residual_scale": (0.5 / whole[:, 5::4].T).nan_to_num(posinf=0.0) * (rng.random() < 0.8),
    }
    scales = {name: value.float().contiguous() for name, value in scales.items()}
    if rng.random() < 0.4:  # in place: the padding is written
        z, flat = place("z", z_values, columns)
        out = z
    else:
        out, flat = place("out", torch.full_like(z_values, 7.0), columns)
    before = flat.clone()
    native.logit_gradient(
        z,
        t,
        labels,
        residuals=residuals,
        shard=VocabularyShard(start, valid, IGNORE),
        **as_rows(**scales),
        out=out,
    )
    expected = exact_gradient(z_values, t_values, labels, residuals, start, valid, scales)
    smallest = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 1e-9
    bound = (torch.finfo(dtype).eps / 2 + 1e-6) * expected.value.abs() + 1.17 * 2**-23 * expected.of_exponents
    assert_close(out.double(), expected.value, 0, bound + smallest + 5e-7, "gradient")
    assert (out[:, valid:] == 0).all(), "padding columns must be exact zeros"
    between = torch.ones(len(flat), dtype=torch.bool)
    between.as_strided((rows, columns), (out.stride(0), 1)).zero_()
    assert torch.equal(flat[between].nan_to_num(), before[between].nan_to_num()), "written between rows"
    if valid > 0 and residuals:
        check_divergence(rng, z_values, t_values, z, t, labels.clamp(max=start + columns), residuals, start, valid)


def check_divergence(rng, z_values, t_values, z, t, labels, residuals, start, valid):
    """Its sums and its gradient, of the matrices as they lie; where the gradient went into the logits, of a copy."""
    if torch.equal(z[:, :valid], z_values[:, :valid]):
        z_now, t_now = z, t
    else:
        z_now, t_now = z_values, t
    divergence = rng.choice(list(DIVERGENCES.values()))
    exact = exact_divergence(z_values, t_values, labels, residuals[0], valid, divergence)
    # Nothing to compare where a row has no finite logit, or the divergence is infinite.
    rows = exact.value.isfinite() & exact.mean.isfinite() & exact.maxima.isfinite().all(0)
    shard = VocabularyShard(start, valid, IGNORE)
    inputs = dict(residuals=residuals[:1], divergence=divergence, shard=shard)
    found = native.divergence_sums(z_now, t_now, labels, **inputs, maxima=exact.maxima, scales=exact.scales).double()
    # A log ratio is rounded at the size of its two exponents, and off by the exponential's 1.17 |x| units besides.
    size = (2e-6 + 4 * 2**-23 * exact.of_exponents.sum(-1))[rows]
    assert_close(found[rows, 0], exact.mean[rows], 2e-6, size, "mean of h")
    assert_close(found[rows, 1], exact.value[rows], 2e-6, size, "divergence")
    maxima = torch.cat([exact.maxima, exact.mean.float()[None]])
    scales = torch.stack([torch.zeros_like(exact.scales[0]), torch.zeros_like(exact.scales[0]), 0 * exact.scales[1]])
    scales = torch.cat([scales, exact.scales[:1]])
    out = torch.full_like(z_values, 7.0)
    native.logit_gradient(z_now, t_now, labels, **inputs, maxima=maxima, scales=scales, out=out)
    smallest = torch.finfo(out.dtype).smallest_normal if out.dtype == torch.float16 else 1e-9
    eps = torch.finfo(out.dtype).eps / 2 + 2e-6
    bound = smallest + size[:, None] + 0 * exact.gradient[rows]
    assert_close(out[rows, :valid].double(), exact.gradient[rows], eps, bound, "gradient of a divergence")
    assert (out[:, valid:] == 0).all()


@pytest.mark.parametrize("first", range(0, CASES, PER_TEST))
def test_random_cases_match_float64_and_touch_nothing_else(first, memory, emulated):
    for seed in range(first, first + PER_TEST):
        try:
            check(seed, memory)
        except Exception as error:
            error.add_note(f"check({seed}, memory)")
            raise


@pytest.mark.parametrize("at_end", [False, True])
def test_a_column_too_many_is_an_error(at_end, memory, emulated):
    z, _ = memory["z"].place(torch.zeros(1, 40), 40, 40, at_end)
    labels = torch.zeros(1, dtype=torch.int64)
    statistics(z, None, labels, ())
    wrong = z.as_strided((1, 41), (41, 1), z.storage_offset() - (not at_end))
    with pytest.raises(RuntimeError, match="thread .* of block 0 touched memory that is not there"):
        statistics(wrong, None, labels, ())
    statistics(z, None, labels, ())


def test_an_address_that_is_not_aligned_is_an_error(emulated):
    partials, supervised, out = torch.zeros(2, 4), torch.ones(1, dtype=torch.bool), torch.zeros(5, 1).double()
    with pytest.raises(RuntimeError, match="token_math.h:.* misaligned address"):
        emulated.cuda_merge(
            *(partials.data_ptr() + 2, supervised.data_ptr(), out.data_ptr()),
            *(False, 1, 1, (False, 0, False, False, False, False), []),
            *(0, 0),
        )
