// The rows in AVX2, FMA and F16C. Compiled for those alone; run only where the processor has them.

#include <immintrin.h>

#include "rows.h"
#include "variants.h"
#include "vector_math.h"

namespace qtarget {
namespace {

struct Avx2 {
    using Vec = __m256;
    static constexpr int64_t kWidth = 8;
    // More would not fit the 16 registers.
    static constexpr int kSumsInFlight = 2;
    static constexpr int kGradientInFlight = 4;
    static constexpr bool kStreams = true;

    using Mode = FlushSubnormals;

    struct Sum {
        Vec lanes = _mm256_setzero_ps();
        void add(Vec v) { lanes = lanes + v; }
        void add_product(Vec a, Vec b) { lanes = _mm256_fmadd_ps(a, b, lanes); }
        void add_weighted(Vec weight, Vec v) {
            // Unordered or unequal: a weight of NaN counts.
            const Vec counts = _mm256_cmp_ps(weight, _mm256_setzero_ps(), _CMP_NEQ_UQ);
            lanes = lanes + _mm256_and_ps(weight * v, counts);
        }
        double total() const {
            const __m256d pair = _mm256_add_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(lanes)),
                                               _mm256_cvtps_pd(_mm256_extractf128_ps(lanes, 1)));
            const __m128d two =
                _mm_add_pd(_mm256_castpd256_pd128(pair), _mm256_extractf128_pd(pair, 1));
            return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
        }
    };

    static Vec set(float value) { return _mm256_set1_ps(value); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }

    // max returns its second operand where one is NaN: `current` never turns NaN.
    static Vec larger(Vec candidate, Vec current) { return _mm256_max_ps(candidate, current); }

    static float max_lanes(Vec v) {
        __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
        four = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(four, _mm_shuffle_ps(four, four, 1)));
    }

    template <Dtype D>
    static Vec load(const char* at) {
        if constexpr (D == Dtype::kFloat32) {
            return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
        } else {
            const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
            if constexpr (D == Dtype::kFloat16) return _mm256_cvtph_ps(half);
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        }
    }

    // Rounds to nearest even in the high halves of the lanes. v: no NaN but the canonical one,
    // which others could round up to infinity or -0.
    static __m256i round_to_bfloat16(Vec v) {
        const __m256i bits = _mm256_castps_si256(v);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i rounded =
            _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        return _mm256_srli_epi32(rounded, 16);
    }

    template <int U>
    static void make_nan_canonical(Vec (&v)[U]) {
        Vec nan = _mm256_setzero_ps();
        for (int i = 0; i < U; i += 2)
            nan = _mm256_or_ps(nan, _mm256_cmp_ps(v[i], v[i + 1], _CMP_UNORD_Q));
        if (__builtin_expect(_mm256_movemask_ps(nan) == 0, 1)) return;
        for (Vec& value : v) {
            const Vec is_nan = _mm256_cmp_ps(value, value, _CMP_UNORD_Q);
            value = _mm256_blendv_ps(value, _mm256_set1_ps(NAN), is_nan);
        }
    }

    template <Dtype D, bool Stream, int U>
    static void store(char* at, Vec (&v)[U]) {
        __m256i* const target = reinterpret_cast<__m256i*>(at);
        const auto put = [](__m256i* where, __m256i what) {
            Stream ? _mm256_stream_si256(where, what) : _mm256_storeu_si256(where, what);
        };
        if constexpr (D == Dtype::kFloat32) {
            for (int i = 0; i < U; ++i) put(target + i, _mm256_castps_si256(v[i]));
        } else if constexpr (D == Dtype::kFloat16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            for (int i = 0; i < U; i += 2) {
                put(target + i / 2, _mm256_set_m128i(_mm256_cvtps_ph(v[i + 1], kNearest),
                                                     _mm256_cvtps_ph(v[i], kNearest)));
            }
        } else {
            make_nan_canonical(v);
            for (int i = 0; i < U; i += 2) {
                // Packs within each half of the registers: quarters 0 2 1 3 of the result.
                const __m256i mixed =
                    _mm256_packus_epi32(round_to_bfloat16(v[i]), round_to_bfloat16(v[i + 1]));
                put(target + i / 2, _mm256_permute4x64_epi64(mixed, 0xd8));
            }
        }
    }

    static void fence() { _mm_sfence(); }

    // At -127 ln 2 the power of two below is exactly 0, further down it would be anything. Where x
    // is NaN, max returns it: its second operand.
    static Vec raised(Vec x) { return _mm256_max_ps(set(-88.02969193f), x); }

    template <int U>
    static void exp(Vec (&x)[U], Vec (&weight)[U]) {
        for (Vec& value : x) value = raised(value);
        exp_of_raised(x, weight);
    }

    template <int U>
    static void exp_alone(const Vec (&x)[U], Vec (&weight)[U]) {
        Vec y[U];
        for (int i = 0; i < U; ++i) y[i] = raised(x[i]);
        exp_of_raised(y, weight);
    }

    // e^x = 2^k e^r with k = round(x / ln 2).
    template <int U>
    static void exp_of_raised(const Vec (&x)[U], Vec (&weight)[U]) {
        // 1.5 * 2^23 rounds to an integer in the low bits; 127 is the exponent's bias.
        const Vec magic = set(12582912.0f + 127.0f);
        Vec shifted[U], r[U];
        for (int i = 0; i < U; ++i) shifted[i] = fma(x[i], set(kLog2E), magic);
        for (int i = 0; i < U; ++i) r[i] = fma(shifted[i] - magic, set(-kLn2), x[i]);
        evaluate<Avx2>(kExp, r, weight);
        for (int i = 0; i < U; ++i) {
            const __m256i power = _mm256_slli_epi32(_mm256_castps_si256(shifted[i]), 23);
            weight[i] = weight[i] * _mm256_castsi256_ps(power);
        }
    }

    static Vec exponential(Vec x) { return exponential_of<Avx2>(x); }

    static Vec logarithm(Vec x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i exponent =
            _mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(127));
        const __m256i mantissa = _mm256_or_si256(
            _mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f800000));
        const Vec log = logarithm_of<Avx2>(_mm256_cvtepi32_ps(exponent),
                                           _mm256_castsi256_ps(mantissa));
        return x == x ? log : x;
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
};

}  // namespace

const RowFunctions kAvx2Rows = {
    {statistics_row<Avx2, 0>, statistics_row<Avx2, 1>, statistics_row<Avx2, 2>},
    divergence_row<Avx2>,
    gradient_row<Avx2>,
};

}  // namespace qtarget
