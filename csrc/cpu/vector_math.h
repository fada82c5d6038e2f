// What the vector paths share: polynomials of their exponentials, and the mode of their arithmetic.
#pragma once

#include <immintrin.h>

#include "../core.h"

namespace qtarget {

// Coefficients c_1, c_2, ... of 1 + c_1 r + c_2 r^2 + ..., of least relative error.
// e^r on [-ln 2 / 2, ln 2 / 2], error 2e-9. One term less, 1e-7 in every exponential, is seen: the
// maximum of a shard moves it, and training at other layouts drifts apart.
constexpr float kExp[] = {1.0f,             0.499999940395f, 0.166664317250f,
                          0.041668001562f, 0.008374162950f, 0.001384364441f};
// 2^r on [0, 1], exact at both ends but for the coefficients' rounding, error 1.4e-8.
constexpr float kExp2[] = {0.693147032401f,  0.240229513286f,   0.0554841524758f,
                           0.0096780638774f, 0.00124408770503f, 0.000217150254964f};

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

template <class V, int Degree, class Vec, int U>
QTARGET_FN void evaluate(const float (&coefficients)[Degree], const Vec (&r)[U], Vec (&value)[U]) {
    for (int i = 0; i < U; ++i) value[i] = V::set(coefficients[Degree - 1]);
#pragma GCC unroll 8
    for (int n = Degree - 2; n >= 0; --n)
        for (int i = 0; i < U; ++i) value[i] = V::fma(value[i], r[i], V::set(coefficients[n]));
    for (int i = 0; i < U; ++i) value[i] = V::fma(value[i], r[i], V::set(1.0f));
}

template <class V, class Vec>
QTARGET_FN Vec exponential_of(Vec x) {
    Vec in[1] = {x}, out[1];
    V::exp_alone(in, out);
    return out[0];
}

// log(2^exponent mantissa), mantissa in [1, 2): 2 artanh((m - 1) / (m + 1)) with m in
// [1 / sqrt 2, sqrt 2], whose series is cut where a term is below 1e-9.
template <class V, class Vec>
QTARGET_FN Vec logarithm_of(Vec exponent, Vec mantissa) {
    const Vec one = V::set(1.0f), root = V::set(1.41421354f);
    exponent = mantissa > root ? exponent + one : exponent;
    mantissa = mantissa > root ? mantissa * V::set(0.5f) : mantissa;
    const Vec s = (mantissa - one) / (mantissa + one);
    const Vec square = s * s;
    Vec series = V::fma(V::set(2.0f / 9.0f), square, V::set(2.0f / 7.0f));
    series = V::fma(series, square, V::set(2.0f / 5.0f));
    series = V::fma(series, square, V::set(2.0f / 3.0f));
    series = V::fma(series, square, V::set(2.0f));
    return V::fma(exponent, V::set(kLn2), s * series);
}

// While one lives, this thread's float arithmetic makes 0 in place of subnormal numbers: they are
// not worth their cost, which is a hundredfold on some processors. It still takes those that it is
// given.
class FlushSubnormals {
  public:
    __attribute__((always_inline)) FlushSubnormals() : before_(_mm_getcsr()) {
        _mm_setcsr(before_ | _MM_FLUSH_ZERO_ON);
    }
    __attribute__((always_inline)) ~FlushSubnormals() { _mm_setcsr(before_); }
    FlushSubnormals(const FlushSubnormals&) = delete;
    FlushSubnormals& operator=(const FlushSubnormals&) = delete;

  private:
    unsigned before_;
};

}  // namespace qtarget
