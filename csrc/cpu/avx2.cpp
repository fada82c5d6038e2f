// The rows in AVX2, FMA and F16C. Compiled for those alone; run only where the processor has them.

#include <immintrin.h>

#include "rows.h"
#include "variants.h"

namespace qtarget {
namespace {

using Vec = __m256;

// exp(x) for x <= 0; NaN stays NaN. Below -87.7 the result is exactly 0 (float32 subnormals are not
// worth their cost). x is clamped to -127 ln 2 on the way, so that weight * x is 0 there and not 0
// * -inf. 2^k 2^f with k = round(x / ln 2); degree-6 minimax polynomial for exp on [-ln 2 / 2, ln 2
// / 2], relative error 2e-9.
inline Vec exp_nonpositive(Vec& x) {
    // max returns its second operand where one is NaN.
    x = _mm256_max_ps(_mm256_set1_ps(-88.02969193f), x);
    // 1.5 * 2^23 rounds to an integer in the low bits; 127 is the exponent bias.
    const Vec magic = _mm256_set1_ps(12582912.0f + 127.0f);
    const Vec shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(1.44269504f), magic);
    const Vec power = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(shifted), 23));
    const Vec k = _mm256_sub_ps(shifted, magic);
    const Vec f = _mm256_fnmadd_ps(k, _mm256_set1_ps(0.693147181f), x);
    Vec p = _mm256_set1_ps(0.001384364441f);
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.008374162950f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.041668001562f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.166664317250f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(0.499999940395f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(1.0f));
    return _mm256_mul_ps(p, power);
}

inline double sum_lanes(Vec v) {
    const __m256d pair = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(v)),
                                       _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
    const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(pair), _mm256_extractf128_pd(pair, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}

inline float max_lanes(Vec v) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
}

inline Vec residual_vector(float a, float b, Vec z, Vec t) {
    const Vec u = a != 0.0f ? _mm256_mul_ps(_mm256_set1_ps(a), z) : _mm256_setzero_ps();
    return b != 0.0f ? _mm256_fmadd_ps(_mm256_set1_ps(b), t, u) : u;
}

inline __m128i to_bfloat16(Vec v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

struct Avx2Ops {
    static constexpr int64_t kWidth = 8;

    static void load(const char* source, Dtype dtype, int64_t count, float* values) {
        if (dtype == Dtype::kFloat32) {
            std::memcpy(values, source, count * sizeof(float));
            return;
        }
        int64_t k = 0;
        for (; k + 8 <= count; k += 8) {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + 2 * k));
            const Vec wide =
                dtype == Dtype::kBFloat16
                    ? _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16))
                    : _mm256_cvtph_ps(half);
            _mm256_storeu_ps(values + k, wide);
        }
        for (; k < count; ++k) {
            uint16_t half;
            std::memcpy(&half, source + 2 * k, sizeof half);
            values[k] =
                dtype == Dtype::kBFloat16 ? bfloat16_to_float(half) : float16_to_float(half);
        }
    }

    static void store(const float* values, Dtype dtype, int64_t count, char* target) {
        if (dtype == Dtype::kFloat32) {
            std::memcpy(target, values, count * sizeof(float));
            return;
        }
        int64_t k = 0;
        for (; k + 8 <= count; k += 8) {
            const Vec wide = _mm256_loadu_ps(values + k);
            const __m128i half =
                dtype == Dtype::kBFloat16
                    ? to_bfloat16(wide)
                    : _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(target + 2 * k), half);
        }
        for (; k < count; ++k) {
            const uint16_t half = dtype == Dtype::kBFloat16 ? float_to_bfloat16(values[k])
                                                            : float_to_float16(values[k]);
            std::memcpy(target + 2 * k, &half, sizeof half);
        }
    }

    static float max(const float* values, int64_t count) {
        // max returns its second operand where one is NaN: the running maximum comes second and
        // never turns NaN.
        Vec top[4];
        for (Vec& lane : top) lane = _mm256_set1_ps(-INFINITY);
        int64_t k = 0;
        for (; k + 32 <= count; k += 32) {
            for (int i = 0; i < 4; ++i)
                top[i] = _mm256_max_ps(_mm256_loadu_ps(values + k + 8 * i), top[i]);
        }
        for (; k < count; k += 8) top[0] = _mm256_max_ps(_mm256_loadu_ps(values + k), top[0]);
        return max_lanes(
            _mm256_max_ps(_mm256_max_ps(top[0], top[1]), _mm256_max_ps(top[2], top[3])));
    }

    static void combine(float a, float b, const float* z, const float* t, int64_t count, float* u) {
        for (int64_t k = 0; k < count; k += 8) {
            _mm256_storeu_ps(u + k,
                             residual_vector(a, b, _mm256_loadu_ps(z + k), _mm256_loadu_ps(t + k)));
        }
    }

    static int64_t above(const float* values, int64_t count, float threshold, float* hits) {
        const Vec limit = _mm256_set1_ps(threshold);
        int64_t found = 0;
        const auto compare = [&](int64_t k) {
            return _mm256_cmp_ps(_mm256_loadu_ps(values + k), limit, _CMP_GT_OQ);
        };
        const auto take = [&](int64_t k, Vec above) {
            unsigned lanes = static_cast<unsigned>(_mm256_movemask_ps(above));
            for (; lanes != 0; lanes &= lanes - 1) hits[found++] = values[k + __builtin_ctz(lanes)];
        };
        int64_t k = 0;
        for (; k + 32 <= count; k += 32) {
            Vec above[4];
            for (int i = 0; i < 4; ++i) above[i] = compare(k + 8 * i);
            const Vec any =
                _mm256_or_ps(_mm256_or_ps(above[0], above[1]), _mm256_or_ps(above[2], above[3]));
            if (_mm256_movemask_ps(any) == 0) continue;
            for (int i = 0; i < 4; ++i) take(k + 8 * i, above[i]);
        }
        for (; k < count; k += 8) take(k, compare(k));
        return found;
    }

    template <bool Collision>
    static BlockSums base_sums(const float* z, int64_t count, float z_centre) {
        const Vec origin = _mm256_set1_ps(z_centre);
        Vec s[2], e[2], c[2];
        for (int i = 0; i < 2; ++i) s[i] = e[i] = c[i] = _mm256_setzero_ps();
        const auto step = [&](int64_t k, int i) {
            Vec shifted = _mm256_sub_ps(_mm256_loadu_ps(z + k), origin);
            const Vec weight = exp_nonpositive(shifted);
            s[i] = _mm256_add_ps(s[i], weight);
            e[i] = _mm256_fmadd_ps(weight, shifted, e[i]);
            if (Collision) {
                // 2^60: squares of weights down to e^-85 are then no subnormal numbers, which some
                // processors add a hundred times slower, and a block's sum stays below 2^127.
                const Vec scaled = _mm256_mul_ps(weight, _mm256_set1_ps(0x1p60f));
                c[i] = _mm256_fmadd_ps(scaled, scaled, c[i]);
            }
        };
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            for (int i = 0; i < 2; ++i) step(k + 8 * i, i);
        }
        if (k < count) step(k, 0);
        return {sum_lanes(s[0]) + sum_lanes(s[1]), sum_lanes(e[0]) + sum_lanes(e[1]),
                Collision ? (sum_lanes(c[0]) + sum_lanes(c[1])) * 0x1p-120 : 0.0};
    }

    template <bool Entropy>
    static ResidualBlockSums residual_sums(const float* u, const float* z, int64_t count,
                                           float u_centre, float z_centre) {
        const Vec u_origin = _mm256_set1_ps(u_centre);
        const Vec z_origin = _mm256_set1_ps(z_centre);
        Vec s[2], x[2], h[2];
        for (int i = 0; i < 2; ++i) s[i] = x[i] = h[i] = _mm256_setzero_ps();
        const auto step = [&](int64_t k, int i) {
            Vec shifted = _mm256_sub_ps(_mm256_loadu_ps(u + k), u_origin);
            const Vec weight = exp_nonpositive(shifted);
            const Vec cross =
                _mm256_mul_ps(weight, _mm256_sub_ps(_mm256_loadu_ps(z + k), z_origin));
            // Unordered or unequal: a weight of NaN counts, a weight of 0 removes 0 * -inf.
            const Vec counts = _mm256_cmp_ps(weight, _mm256_setzero_ps(), _CMP_NEQ_UQ);
            s[i] = _mm256_add_ps(s[i], weight);
            x[i] = _mm256_add_ps(x[i], _mm256_and_ps(cross, counts));
            if (Entropy) h[i] = _mm256_fmadd_ps(weight, shifted, h[i]);
        };
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            for (int i = 0; i < 2; ++i) step(k + 8 * i, i);
        }
        if (k < count) step(k, 0);
        return {sum_lanes(s[0]) + sum_lanes(s[1]), sum_lanes(x[0]) + sum_lanes(x[1]),
                Entropy ? sum_lanes(h[0]) + sum_lanes(h[1]) : 0.0};
    }

    static double uniform_cross(const float* z, int64_t count, float z_centre) {
        const Vec origin = _mm256_set1_ps(z_centre);
        Vec x[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
        int64_t k = 0;
        for (; k + 16 <= count; k += 16) {
            for (int i = 0; i < 2; ++i) {
                x[i] = _mm256_add_ps(x[i], _mm256_sub_ps(_mm256_loadu_ps(z + k + 8 * i), origin));
            }
        }
        double total = sum_lanes(x[0]) + sum_lanes(x[1]);
        for (; k < count; ++k) total += z[k] - z_centre;
        return total;
    }

    template <int Terms>
    static void gradient(const float* z, const float* t, int64_t count, float max, float scale,
                         float constant, const GradientTerm* terms, float* result) {
        const Vec origin = _mm256_set1_ps(max);
        const Vec mass = _mm256_set1_ps(scale);
        const Vec flat = _mm256_set1_ps(constant);
        for (int64_t k = 0; k < count; k += 8) {
            const Vec logit = _mm256_loadu_ps(z + k);
            Vec shifted = _mm256_sub_ps(logit, origin);
            Vec value = _mm256_sub_ps(_mm256_mul_ps(exp_nonpositive(shifted), mass), flat);
            for (int i = 0; i < Terms; ++i) {
                const Vec u =
                    residual_vector(terms[i].a, terms[i].b, logit, _mm256_loadu_ps(t + k));
                Vec shifted_u = _mm256_sub_ps(u, _mm256_set1_ps(terms[i].max));
                // Not fused: equal terms cancel to exactly 0.
                value = _mm256_sub_ps(value, _mm256_mul_ps(exp_nonpositive(shifted_u),
                                                           _mm256_set1_ps(terms[i].scale)));
            }
            _mm256_storeu_ps(result + k, value);
        }
    }
};

}  // namespace

const RowFunctions kAvx2Rows = {
    {statistics_row<Avx2Ops, 0>, statistics_row<Avx2Ops, 1>, statistics_row<Avx2Ops, 2>},
    gradient_row<Avx2Ops>,
};

}  // namespace qtarget
