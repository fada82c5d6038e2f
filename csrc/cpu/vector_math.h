// What the vector paths share: polynomials of their exponentials, and the mode of their arithmetic.
#pragma once

#include <immintrin.h>

#include "../core.h"

namespace qtarget {

// Coefficients c_1, c_2, ... of 1 + c_1 r + c_2 r^2 + ..., of least relative error.
// e^r on [-ln 2 / 2, ln 2 / 2], error 9.2e-8.
constexpr float kExp[] = {0.999999701977f, 0.499991476536f, 0.166676491499f, 0.041898176074f,
                          0.00828963331878f};
// 2^r on [0, 1], exact at both ends, error 1.0e-7.
constexpr float kExp2[] = {0.693151712418f, 0.240159273148f, 0.0558186769485f, 0.0089909946546f,
                           0.00187934283167f};

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
