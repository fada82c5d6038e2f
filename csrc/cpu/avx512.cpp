// The rows in AVX-512 F, BW, DQ and VL. Compiled for those alone; run only where the processor has
// them. The conversion of AVX512_BF16 is used where the processor has that as well.

#include <immintrin.h>

#include "rows.h"
#include "variants.h"
#include "vector_math.h"

namespace qtarget {
namespace {

struct Avx512 {
    using Vec = __m512;
    static constexpr int64_t kWidth = 16;
    static constexpr int kSumsInFlight = 4;
    static constexpr int kGradientInFlight = 4;
    static constexpr bool kStreams = true;

    using Mode = FlushSubnormals;

    struct Sum {
        Vec lanes = _mm512_setzero_ps();
        void add(Vec v) { lanes = lanes + v; }
        void add_product(Vec a, Vec b) { lanes = _mm512_fmadd_ps(a, b, lanes); }
        void add_weighted(Vec weight, Vec v) {
            // Unordered or unequal: a weight of NaN counts.
            const __mmask16 counts = _mm512_cmp_ps_mask(weight, _mm512_setzero_ps(), _CMP_NEQ_UQ);
            lanes = _mm512_mask3_fmadd_ps(weight, v, lanes, counts);
        }
        double total() const {
            const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(lanes));
            const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(lanes, 1));
            return _mm512_reduce_add_pd(low + high);
        }
    };

    static Vec set(float value) { return _mm512_set1_ps(value); }
    static Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }

    // max returns its second operand where one is NaN: `current` never turns NaN.
    static Vec larger(Vec candidate, Vec current) { return _mm512_max_ps(candidate, current); }

    static float max_lanes(Vec v) { return _mm512_reduce_max_ps(v); }

    template <Dtype D>
    static Vec load(const char* at) {
        if constexpr (D == Dtype::kFloat32) {
            return _mm512_loadu_ps(at);
        } else {
            const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
            if constexpr (D == Dtype::kFloat16) return _mm512_cvtph_ps(half);
            return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
        }
    }

    // In assembly: the compiler would ask for a flag that lets it use AVX512_BF16 anywhere. Takes
    // subnormal numbers as 0.
    static __m256i convert_to_bfloat16(Vec v) {
        __m256i half;
        asm("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(v));
        return half;
    }

    static __m256i round_to_bfloat16(Vec v) {
        const __m512i bits = _mm512_castps_si512(v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i rounded =
            _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __m512i kept = _mm512_mask_or_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q),
                                                  bits, _mm512_set1_epi32(0x00400000));
        return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
    }

    template <Dtype D, bool Stream, int U>
    static void store(char* at, const Vec (&v)[U]) {
        if constexpr (D == Dtype::kFloat32) {
            for (int i = 0; i < U; ++i) {
                float* const target = reinterpret_cast<float*>(at) + i * kWidth;
                Stream ? _mm512_stream_ps(target, v[i]) : _mm512_storeu_ps(target, v[i]);
            }
        } else if constexpr (D == Dtype::kFloat16) {
            constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
            store_halves<Stream>(at, v, [](Vec one) { return _mm512_cvtps_ph(one, kNearest); });
        } else if (kHasAvx512Bf16) {
            store_halves<Stream>(at, v, convert_to_bfloat16);
        } else {
            store_halves<Stream>(at, v, round_to_bfloat16);
        }
    }

    template <bool Stream, class Narrow, int U>
    static void store_halves(char* at, const Vec (&v)[U], const Narrow& narrow) {
        for (int i = 0; i < U; ++i) {
            __m256i* const target = reinterpret_cast<__m256i*>(at) + i;
            const __m256i half = narrow(v[i]);
            Stream ? _mm256_stream_si256(target, half) : _mm256_storeu_si256(target, half);
        }
    }

    static void fence() { _mm_sfence(); }

    template <int U>
    static void exp(Vec (&x)[U], Vec (&weight)[U]) {
        // Its second operand where x is NaN.
        for (Vec& value : x) value = _mm512_max_ps(set(kLowestExponent), value);
        exp_alone(x, weight);
    }

    // e^x = 2^k 2^r with k = floor(x / ln 2), which scalef takes from x / ln 2 itself; 0 at -inf.
    template <int U>
    static void exp_alone(const Vec (&x)[U], Vec (&weight)[U]) {
        constexpr int kFloor = _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC;
        Vec t[U], r[U];
        for (int i = 0; i < U; ++i) t[i] = x[i] * set(kLog2E);
        for (int i = 0; i < U; ++i) r[i] = _mm512_reduce_ps(t[i], kFloor);
        evaluate<Avx512>(kExp2, r, weight);
        for (int i = 0; i < U; ++i) weight[i] = _mm512_scalef_ps(weight[i], t[i]);
    }

    static Vec exponential(Vec x) { return exponential_of<Avx512>(x); }

    static Vec logarithm(Vec x) {
        const Vec mantissa = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_src);
        return logarithm_of<Avx512>(_mm512_getexp_ps(x), mantissa);
    }

    static int64_t above(const float* values, int64_t count, float threshold, float* hits) {
        const Vec limit = _mm512_set1_ps(threshold);
        int64_t found = 0;
        for (int64_t k = 0; k < count; k += kWidth) {
            const Vec v = _mm512_loadu_ps(values + k);
            const __mmask16 over = _mm512_cmp_ps_mask(v, limit, _CMP_GT_OQ);
            if (over == 0) continue;
            // Compressed in a register: compressing to memory is slow on some processors.
            _mm512_storeu_ps(hits + found, _mm512_maskz_compress_ps(over, v));
            found += __builtin_popcount(over);
        }
        return found;
    }
};

}  // namespace

const RowFunctions kAvx512Rows = {
    {statistics_row<Avx512, 0>, statistics_row<Avx512, 1>, statistics_row<Avx512, 2>},
    divergence_row<Avx512>,
    gradient_row<Avx512>,
};

}  // namespace qtarget
