// One element in any of the dtypes. Rounding is to nearest even, NaN stays NaN.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core.h"

namespace qtarget {

QTARGET_FN uint32_t float_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

QTARGET_FN float bits_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

QTARGET_FN float bfloat16_to_float(uint16_t half) {
    return bits_float(static_cast<uint32_t>(half) << 16);
}

QTARGET_FN uint16_t float_to_bfloat16(float value) {
    const uint32_t bits = float_bits(value);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x0040u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

QTARGET_FN float float16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t rest = static_cast<uint32_t>(half & 0x7fffu) << 13;
    if ((half & 0x7c00u) == 0x7c00u) return bits_float(sign | rest | 0x7f800000u);
    // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals on the way.
    return bits_float(sign | float_bits(bits_float(rest) * bits_float(0x77800000u)));
}

QTARGET_FN uint16_t float_to_float16(float value) {
    const uint32_t bits = float_bits(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u)
        return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x03ffu));
    if (magnitude >= 0x477ff000u)
        return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and above round to infinity
    if (magnitude < 0x38800000u) {
        // Subnormal result: adding 0.5 leaves units of 2^-24 in the low bits, rounded to nearest
        // even by the addition.
        return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) & 0x07ffu));
    }
    const uint32_t rounded = magnitude + 0x0fffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

QTARGET_FN constexpr int64_t size_of(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 4 : 2;
}

template <Dtype D>
QTARGET_FN float read(const char* source) {
    if constexpr (D == Dtype::kFloat32) {
        float value;
        std::memcpy(&value, source, sizeof value);
        return value;
    } else {
        uint16_t half;
        std::memcpy(&half, source, sizeof half);
        return D == Dtype::kBFloat16 ? bfloat16_to_float(half) : float16_to_float(half);
    }
}

template <Dtype D>
QTARGET_FN void write(char* target, float value) {
    if constexpr (D == Dtype::kFloat32) {
        std::memcpy(target, &value, sizeof value);
    } else {
        const uint16_t half =
            D == Dtype::kBFloat16 ? float_to_bfloat16(value) : float_to_float16(value);
        std::memcpy(target, &half, sizeof half);
    }
}

}  // namespace qtarget
