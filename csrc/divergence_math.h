// Divergences of the model's distribution p from a residual's r, as functions of l = log p - log r.
//
//   D(p, r) = sum p A(l) + r B(l)        dD / dz_k = p_k (h(l_k) - sum_j p_j h(l_j))
//
//   reverse KL        KL(p || r)                                         A = h = l, B = 0
//   mixture           of_residual KL(r || m) + of_model KL(p || m),      m = share r + (1 - share) p
//                     h = of_model (log x + 1 - x) - of_residual (1 - share) r / m,
//                     x = (1 - share) p / m
//   total variation   1/2 sum |p - r|                                    A = h = sign(l) / 2, B = -A
//
// Written once over a type V of operations, for numbers and for vectors of them: set, and
//
//   exponential  e^x for x <= 0    logarithm  of numbers in (0, 1]
#pragma once

#include "row_math.h"

namespace qtarget {

enum class DivergenceKind : int { kNone = 0, kReverseKl = 1, kMixture = 2, kTotalVariation = 3 };

struct Divergence {
    DivergenceKind kind;
    float share;
    float rest;  // 1 - share, which float32 could not tell from 0 near 1
    float log_rest;
    float of_residual;
    float of_model;
};

// Closer than float32 can tell: which of p and r is larger is then rounding.
constexpr float kTie = 0x1p-20f;

// Below it a share of the mixture is not taken a logarithm of: it may have underflowed.
constexpr float kSmall = 0x1p-14f;

template <class Vec>
struct DivergenceTerms {
    Vec slope;        // h
    Vec of_model;     // A
    Vec of_residual;  // B
};

template <class V, class Vec>
QTARGET_FN DivergenceTerms<Vec> divergence_terms(const Divergence& divergence, Vec l) {
    const Vec zero = V::set(0.0f), one = V::set(1.0f);
    if (divergence.kind == DivergenceKind::kReverseKl) return {l, l, zero};
    if (divergence.kind == DivergenceKind::kTotalVariation) {
        const Vec half = V::set(0.5f);
        // A NaN stays one.
        const Vec otherwise = l == l ? zero : l;
        const Vec below = l < V::set(-kTie) ? zero - half : otherwise;
        const Vec sign = l > V::set(kTie) ? half : below;
        return {sign, sign, zero - sign};
    }
    // The smaller of p and r over the larger, so that nothing overflows; d is m over the larger.
    const Vec ratio = V::exponential(l < zero ? l : zero - l);
    const Vec share = V::set(divergence.share), rest = V::set(divergence.rest);
    const Vec d = l < zero ? share + rest * ratio : share * ratio + rest;
    const Vec of_larger = one / d, of_smaller = ratio / d;
    const Vec model_over_m = l < zero ? of_smaller : of_larger;
    const Vec residual_over_m = l < zero ? of_larger : of_smaller;
    // log x and log d from one logarithm, since their sum is known. Where the model has all of m, x
    // is near 1 and log x + 1 - x far smaller than its terms: both must be of the same x.
    const Vec x = rest * model_over_m;
    const Vec both = V::set(divergence.log_rest) + (l < zero ? l : zero);
    const Vec log_one = V::logarithm(x < V::set(kSmall) ? d : x);
    const Vec log_other = both - log_one;
    const Vec log_x = x < V::set(kSmall) ? log_other : log_one;
    const Vec log_d = x < V::set(kSmall) ? log_one : log_other;
    const Vec log_model = l < zero ? l - log_d : zero - log_d;
    const Vec log_residual = l < zero ? zero - log_d : zero - log_d - l;
    const Vec of_model = V::set(divergence.of_model), of_residual = V::set(divergence.of_residual);
    const Vec slope = of_model * (log_x + (one - x)) - of_residual * (rest * residual_over_m);
    return {slope, of_model * log_model, of_residual * log_residual};
}

// weight * value, where a weight of 0 removes the value.
template <class V, class Vec>
QTARGET_FN Vec weighted_value(Vec weight, Vec value) {
    return weight == V::set(0.0f) ? V::set(0.0f) : weight * value;
}

}  // namespace qtarget
