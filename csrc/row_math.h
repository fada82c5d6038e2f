// The formulas of one row, shared by the CPU and the CUDA kernels.
//
// A row's sums are held centred on a running maximum and can be moved to a higher one, so a row may
// be visited block by block, lane by lane, or warp by warp, and the parts added at the end:
//
//   m = max z    s = sum exp(z - m)    e = sum exp(z - m) (z - m)            c = sum exp(2 (z - m))
//   per residual u = a z + b t, with the exponent v = a (z - m) + (b t - d) that a centre d makes:
//   s = sum exp(v)    x = sum exp(v) (z - m)    h = sum exp(v) v
//
// The exponent is never u less its maximum: u of large logits is rounded by more than the
// difference may be. It is made of differences, each as exact as its size. a m + d, about max u, is
// added up in double precision at the end.
//
// c (Collision) and h (Entropy) are there on request: without it they stay 0 and cost nothing.
//
// Maxima never hold NaN (comparisons with NaN are false); a NaN or +inf shows in s instead.
#pragma once

#include <float.h>
#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define QTARGET_FN static __host__ __device__ __forceinline__
#else
// Internal linkage: files compiled for different instruction sets must not share one copy.
#define QTARGET_FN static inline __attribute__((always_inline))
#endif

namespace qtarget {

constexpr int kMaxResiduals = 2;
constexpr int kBaseWidth = 4;
constexpr int kResidualWidth = 3;

// u = a z + b t; a coefficient of exactly 0 removes its operand. The kernels' coefficients are
// rounded; what they add to a maximum far from 0 is made up for with the exact ones.
struct Residual {
    float a, b;
    double exact_a, exact_b;
};

// Which numbers a row of the partial holds besides m, s, e, z_y and the residuals' m, s, x.
struct Layout {
    bool collision;         // c
    int64_t top_k;          // this many of the largest z
    bool residual_entropy;  // h of each residual
    bool residual_label;    // t of the label, of each residual that reads it
};

template <class Real, bool Entropy>
struct ResidualSums {
    Real d, s, x, h;
};

template <class Real, int R, bool Collision, bool Entropy>
struct RowSums {
    Real m, s, e, c;
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

QTARGET_FN int64_t partial_width(const Layout& layout, int num_residuals) {
    return residual_column(layout, num_residuals);
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

// Hardware exponential on the GPU: relative error about 1e-7 + |x| 1e-7; exactly 0 at -inf, NaN at
// NaN.
QTARGET_FN float exp_float(float x) {
#if defined(__CUDA_ARCH__)
    return __expf(x);
#else
    return expf(x);
#endif
}

// The exponent v, from z - m and t.
QTARGET_FN float residual_exponent(float a, float b, float d, float shifted, float t) {
    const float v = b != 0.0f ? fmaf(b, t, -d) : -d;
    return a != 0.0f ? fmaf(a, shifted, v) : v;
}

template <class Real, int R, bool Collision, bool Entropy>
QTARGET_FN void clear(RowSums<Real, R, Collision, Entropy>& sums) {
    sums.m = lowest<Real>();
    sums.s = sums.e = sums.c = Real(0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        sums.residual[r].d = lowest<Real>();
        sums.residual[r].s = sums.residual[r].x = sums.residual[r].h = Real(0);
    }
}

// Moves a residual's sums to another centre; `change` is what that adds to every exponent.
template <class Real, bool Entropy>
QTARGET_FN void shift_residual(ResidualSums<Real, Entropy>& sums, Real change) {
    const Real factor = exp(change);
    if (Entropy) sums.h = weighted(factor, sums.h + weighted(sums.s, change));
    sums.x = weighted(factor, sums.x);
    sums.s = factor * sums.s;
}

// Moves the base sums, and the cross sums that share their centre, to a maximum that is not below
// the present one. The residuals' exponents stay what they are. Returns what z - m changes by.
template <class Real, int R, bool Collision, bool Entropy>
QTARGET_FN Real raise_base(RowSums<Real, R, Collision, Entropy>& sums, Real maximum,
                           const Residual* residuals) {
    if (!(maximum > sums.m)) return Real(0);
    const Real offset = centre(sums.m) - maximum;
    const Real factor = exp(sums.m - maximum);
    sums.e = weighted(factor, sums.e + sums.s * offset);
    sums.s = factor * sums.s;
    if (Collision) sums.c = factor * factor * sums.c;
    sums.m = maximum;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        ResidualSums<Real, Entropy>& part = sums.residual[r];
        part.x += weighted(part.s, offset);
        const Real a = residuals[r].a;
        if (a == Real(0) || part.d == lowest<Real>()) continue;
        const Real d = part.d + a * offset;
        if (d < -FLT_MAX) {
            // Next to what is to come it has no weight.
            part.d = lowest<Real>();
            part.s = part.x = part.h = Real(0);
            continue;
        }
        // In float32, d is rounded by more than an exponent may be.
        if (sizeof(Real) < 8) shift_residual(part, a * offset + (part.d - d));
        part.d = d;
    }
    return offset;
}

template <class Real, bool Entropy>
QTARGET_FN void move_residual(ResidualSums<Real, Entropy>& sums, Real d) {
    if (sums.d != lowest<Real>()) shift_residual(sums, sums.d - d);
    sums.d = d;
}

template <class Real, bool Entropy>
QTARGET_FN void raise_residual(ResidualSums<Real, Entropy>& sums, Real d) {
    if (d > sums.d) move_residual(sums, d);
}

// Adds two parts of one row, each with its own maxima.
template <class Real, int R, bool Collision, bool Entropy>
QTARGET_FN void add(RowSums<Real, R, Collision, Entropy>& sums,
                    RowSums<Real, R, Collision, Entropy> other, const Residual* residuals) {
    raise_base(sums, other.m, residuals);
    raise_base(other, sums.m, residuals);
    sums.s += other.s;
    sums.e += other.e;
    if (Collision) sums.c += other.c;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        raise_residual(sums.residual[r], other.residual[r].d);
        raise_residual(other.residual[r], sums.residual[r].d);
        sums.residual[r].s += other.residual[r].s;
        sums.residual[r].x += other.residual[r].x;
        if (Entropy) sums.residual[r].h += other.residual[r].h;
    }
}

// Writes a row of the partial, all but its largest logits: m, s, e, z_y, [c], then m, s, x, [h],
// [t_y] of each residual. A residual's m is max u in float32, and its sums are moved to just that.
template <class Real, int R, bool Collision, bool Entropy>
QTARGET_FN void write_partial(const RowSums<Real, R, Collision, Entropy>& sums, float label_logit,
                              float label_teacher, const Residual* residuals, const Layout& layout,
                              float* out) {
    out[0] = static_cast<float>(sums.m);
    out[1] = static_cast<float>(sums.s);
    out[2] = static_cast<float>(sums.e);
    out[3] = label_logit;
    if (layout.collision) out[kBaseWidth] = static_cast<float>(sums.c);
    const bool has_centre = sums.m != lowest<Real>();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const Residual& residual = residuals[r];
        ResidualSums<Real, Entropy> part = sums.residual[r];
        float m = lowest<float>();
        if (part.d != lowest<Real>() && part.s != Real(0)) {
            double exact = residual.a != 0.0f ? residual.exact_a * centre(sums.m) : 0.0;
            // Near max u it is b t that d stands for.
            exact += residual.b != 0.0f ? part.d * (residual.exact_b / residual.b) : part.d;
            m = static_cast<float>(exact);
            const Real change = static_cast<Real>(exact - m);
            if (change - change == Real(0)) {
                shift_residual(part, change);
            } else {
                m = 0.0f;
                part.s = static_cast<Real>(NAN);
            }
        }
        float* to = out + residual_column(layout, r);
        *to++ = m;
        *to++ = static_cast<float>(part.s);
        // Without a finite logit there is no centre that x could refer to; the merge adds the
        // offset.
        *to++ = has_centre ? static_cast<float>(part.x) : 0.0f;
        if (layout.residual_entropy) *to++ = static_cast<float>(part.h);
        if (layout.residual_label) *to = residual.b != 0.0f ? label_teacher : 0.0f;
    }
}

// A residual's centre and scale in the gradient, whose kernels read max u and max z in float32:
// v = a (z - max z) + (b t - d). What rounding leaves of d goes into the scale.
struct GradientCentre {
    float d, scale;
};

QTARGET_FN GradientCentre gradient_centre(const Residual& residual, float residual_max,
                                          float z_max, float scale) {
    if (residual.a == 0.0f || scale == 0.0f) return {residual_max, scale};
    const float product = residual.a * z_max;
    const float product_error = fmaf(residual.a, z_max, -product);
    const float d = residual_max - product;
    // What the difference was rounded by, exactly.
    const float back = d - residual_max;
    const float difference_error = (residual_max - (d - back)) - (product + back);
    return {d, scale * exp_float(product_error - difference_error)};
}

// One term of the gradient: the softmax probability times its mass, from the exponent.
// Never fused into the subtraction of another term: equal terms cancel to exactly 0.
QTARGET_FN float softmax_term(float exponent, float scale) {
#if defined(__CUDA_ARCH__)
    return __fmul_rn(exp_float(exponent), scale);
#else
    return exp_float(exponent) * scale;
#endif
}

}  // namespace qtarget
