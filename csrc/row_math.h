// The formulas of one row, shared by the CPU and the CUDA kernels.
//
// A row's sums are held centred on a running maximum and can be moved to a higher one, so a row may
// be visited block by block, lane by lane, or warp by warp, and the parts added at the end:
//
//   m = max z    s = sum exp(z - m)    e = sum exp(z - m) (z - m)            c = sum exp(2 (z - m))
//   per residual u = a z + b t:
//   m = max u    s = sum exp(u - m)    x = sum exp(u - m) (z - max z)    h = sum exp(u - m) (u - m)
//   of the first residual:             y = sum exp(z - max z) (u - m)
//
// u itself is never rounded: far from 0 that would cost more than u - m may lose. The maximum may
// be, the sums are centred on just the float that travels.
//
// c (Collision), h (Entropy) and y (Reverse) are there on request: without it they stay 0 and cost
// nothing.
//
// Maxima never hold NaN (comparisons with NaN are false); a NaN or +inf shows in s instead.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define QTARGET_FN static __host__ __device__ __forceinline__
#define QTARGET_FN_MEMBER __host__ __device__ __forceinline__
#else
// Internal linkage: files compiled for different instruction sets must not share one copy.
#define QTARGET_FN static inline __attribute__((always_inline))
#define QTARGET_FN_MEMBER __attribute__((always_inline)) inline
#endif

namespace qtarget {

constexpr int kMaxResiduals = 2;
constexpr int kBaseWidth = 4;
constexpr int kResidualWidth = 3;

// u = a z + b t; a coefficient of exactly 0 removes its operand.
struct Residual {
    float a;
    float b;
};

// Which numbers a row of the partial holds besides m, s, e, z_y and the residuals' m, s, x.
struct Layout {
    bool collision;         // c
    int64_t top_k;          // this many of the largest z
    bool residual_entropy;  // h of each residual
    bool residual_label;    // t of the label, of each residual
    bool reverse_cross;     // y
    bool divergence;        // of the merged statistics: a divergence, and the mean of its h
};

template <class Real, bool Entropy>
struct ResidualSums {
    Real m, s, x, h;
};

template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
struct RowSums {
    Real m, s, e, c, y;
    ResidualSums<Real, Entropy> residual[R > 0 ? R : 1];
};

QTARGET_FN int64_t top_k_column(const Layout& layout) {
    return kBaseWidth + layout.collision;
}

QTARGET_FN int64_t residual_width(const Layout& layout) {
    return kResidualWidth + layout.residual_entropy + layout.residual_label;
}

QTARGET_FN int64_t residual_column(const Layout& layout, int residual) {
    return top_k_column(layout) + layout.top_k + residual_width(layout) * residual;
}

QTARGET_FN int64_t reverse_column(const Layout& layout, int num_residuals) {
    return residual_column(layout, num_residuals);
}

QTARGET_FN int64_t partial_width(const Layout& layout, int num_residuals) {
    return reverse_column(layout, num_residuals) + layout.reverse_cross;
}

template <class Real>
QTARGET_FN Real lowest() {
    return static_cast<Real>(-INFINITY);
}

template <class Real>
QTARGET_FN Real larger(Real candidate, Real current) {
    return candidate > current ? candidate : current;
}

// Sums are centred on this: without a finite logit the centre is 0, so that -inf - centre is -inf
// and not NaN.
template <class Real>
QTARGET_FN Real centre(Real maximum) {
    return maximum == lowest<Real>() ? Real(0) : maximum;
}

// weight * value, where a weight of 0 removes the value (0 * -inf is 0 here).
template <class Real>
QTARGET_FN Real weighted(Real weight, Real value) {
    return weight == Real(0) ? Real(0) : weight * value;
}

// Hardware exponential on the GPU, off by at most 2 + |1.17 x| units in the last place; exactly 1 at
// 0, 0 at -inf, NaN at NaN. The GPU flushes numbers below the normal ones to 0, in every operation:
// exp(x) is 0 from x = -87.34 on.
QTARGET_FN float exp_float(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return expf(x);
#endif
}

// Sums and products that no compiler may fuse.
QTARGET_FN float plain_sum(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fadd_rn(x, y);
#else
    return x + y;
#endif
}

QTARGET_FN float plain_product(float x, float y) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(x, y);
#else
    return x * y;
#endif
}

// Below every product that a finite weight belongs to.
constexpr float kLowestProduct = -1e30f;

// a z + b t - centre, rounded as if at the end alone. A coefficient of 0 removes its operand,
// whatever it holds.
QTARGET_FN float residual_exponent(float a, float b, float centre, float z, float t) {
    if (b == 0.0f) return a == 0.0f ? -centre : fmaf(a, z, -centre);
    if (a == 0.0f) return fmaf(b, t, -centre);
    // az - centre as a sum of two floats (Knuth's), and what the product was rounded by. Without
    // the floor a product of -inf would leave NaN there.
    const float az = larger(kLowestProduct, plain_product(a, z));
    const float sum = plain_sum(az, -centre);
    const float of_centre = plain_sum(sum, -az);
    const float of_az = plain_sum(sum, -of_centre);
    const float lost = plain_sum(plain_sum(az, -of_az), -plain_sum(centre, of_centre));
    return plain_sum(fmaf(b, t, sum), plain_sum(lost, fmaf(a, z, -az)));
}

template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
QTARGET_FN void clear(RowSums<Real, R, Collision, Entropy, Reverse>& sums) {
    sums.m = lowest<Real>();
    sums.s = sums.e = sums.c = sums.y = Real(0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        sums.residual[r].m = lowest<Real>();
        sums.residual[r].s = sums.residual[r].x = sums.residual[r].h = Real(0);
    }
}

// Moves the base sums, and the cross sums that share their centre, to a maximum that is not below
// the present one.
template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
QTARGET_FN void raise_base(RowSums<Real, R, Collision, Entropy, Reverse>& sums, Real maximum) {
    if (!(maximum > sums.m)) return;
    const Real offset = centre(sums.m) - maximum;
    const Real factor = exp(sums.m - maximum);
    sums.e = weighted(factor, sums.e + sums.s * offset);
    sums.s = factor * sums.s;
    if (Collision) sums.c = factor * factor * sums.c;
    if (Reverse) sums.y = weighted(factor, sums.y);
    sums.m = maximum;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        sums.residual[r].x += weighted(sums.residual[r].s, offset);
    }
}

// Moves a residual's sums, and y where it is the first. covered: s of the columns that y has seen.
template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
QTARGET_FN void raise_residual(RowSums<Real, R, Collision, Entropy, Reverse>& sums, int r,
                               Real maximum, Real covered) {
    ResidualSums<Real, Entropy>& residual = sums.residual[r];
    if (!(maximum > residual.m)) return;
    const Real offset = centre(residual.m) - maximum;
    const Real factor = exp(residual.m - maximum);
    if (Entropy) residual.h = weighted(factor, residual.h + residual.s * offset);
    if (Reverse && r == 0) sums.y += weighted(covered, offset);
    residual.x = weighted(factor, residual.x);
    residual.s = factor * residual.s;
    residual.m = maximum;
}

// Adds two parts of one row, each with its own maxima.
template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
QTARGET_FN void add(RowSums<Real, R, Collision, Entropy, Reverse>& sums,
                    RowSums<Real, R, Collision, Entropy, Reverse> other) {
    raise_base(sums, other.m);
    raise_base(other, sums.m);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        raise_residual(sums, r, other.residual[r].m, sums.s);
        raise_residual(other, r, sums.residual[r].m, other.s);
        sums.residual[r].s += other.residual[r].s;
        sums.residual[r].x += other.residual[r].x;
        if (Entropy) sums.residual[r].h += other.residual[r].h;
    }
    sums.s += other.s;
    sums.e += other.e;
    if (Collision) sums.c += other.c;
    if (Reverse) sums.y += other.y;
}

// Writes a row of the partial, all but its largest logits: m, s, e, z_y, [c], then m, s, x, [h],
// [t_y] of each residual, 0 where it reads no teacher, then [y].
template <class Real, int R, bool Collision, bool Entropy, bool Reverse>
QTARGET_FN void write_partial(const RowSums<Real, R, Collision, Entropy, Reverse>& sums,
                              float label_logit, float label_teacher, const Residual* residuals,
                              const Layout& layout, float* out) {
    out[0] = static_cast<float>(sums.m);
    out[1] = static_cast<float>(sums.s);
    out[2] = static_cast<float>(sums.e);
    out[3] = label_logit;
    if (layout.collision) out[kBaseWidth] = static_cast<float>(sums.c);
    const bool has_centre = sums.m != lowest<Real>();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        float* part = out + residual_column(layout, r);
        *part++ = static_cast<float>(sums.residual[r].m);
        *part++ = static_cast<float>(sums.residual[r].s);
        // Without a finite logit there is no centre that x could refer to; the merge adds the
        // offset.
        *part++ = has_centre ? static_cast<float>(sums.residual[r].x) : 0.0f;
        if (layout.residual_entropy) *part++ = static_cast<float>(sums.residual[r].h);
        if (layout.residual_label) *part = residuals[r].b != 0.0f ? label_teacher : 0.0f;
    }
    if (layout.reverse_cross) out[reverse_column(layout, R)] = static_cast<float>(sums.y);
}

// One term of the gradient: the softmax probability times its mass, from the exponent.
// Never fused into the subtraction of another term: equal terms cancel to exactly 0.
QTARGET_FN float softmax_term(float exponent, float scale) {
    return plain_product(exp_float(exponent), scale);
}

}  // namespace qtarget
