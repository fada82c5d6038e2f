// The k largest values of a row, collected while the row is visited.
//
// A value enters where it is larger than the threshold, which at least k values so far exceed or
// reach; NaN and -inf never do. When twice k values are in, about half of them leave and the
// threshold rises: an entry costs O(1) on average in whatever order the values come, and values in
// no order enter about k log(V / k) times.
#pragma once

#include <cstdint>
#include <cstring>

#include "../core.h"
#include "convert.h"

namespace qtarget {

// Values compared between two looks at the room left.
constexpr int64_t kTopGroup = 128;

// Inlined, these would cost the loop over the blocks its registers: 5% where nothing is collected.
#define QTARGET_TOP_FN static inline __attribute__((noinline))

struct TopValues {
    float* values;  // room for top_room(k)
    int64_t k;
    int64_t count;
    float threshold;
};

// Defined once, in scalar.cpp: the library's templates must not be instantiated under AVX2 flags,
// or the linker could keep that copy for a processor without AVX2. No NaN.
void sort_descending(float* values, int64_t count);

// The largest logits to find in a row: no more than there are columns.
QTARGET_FN int64_t top_count(const StatisticsArgs& args) {
    const int64_t columns = args.shard.valid_columns;
    return args.layout.top_k < columns ? args.layout.top_k : columns;
}

QTARGET_FN int64_t top_limit(int64_t k) {
    return 2 * k;
}

QTARGET_FN int64_t top_room(int64_t k) {
    return top_limit(k) + kTopGroup;
}

// Integers in the order of the floats, its own inverse.
QTARGET_FN int32_t ordered(int32_t bits) {
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

QTARGET_FN int64_t rank_of(float value) {
    return ordered(static_cast<int32_t>(float_bits(value)));
}

QTARGET_FN float value_at(int64_t rank) {
    return bits_float(static_cast<uint32_t>(ordered(static_cast<int32_t>(rank))));
}

// Lets all but the k largest leave, or up to `slack` more than k stay. maximum: no value is larger.
//
// Bisects the floats between the threshold and the maximum for one that k values exceed: counting
// has no branch that depends on a value, sorting would mispredict half of its own.
QTARGET_FN void select_largest(TopValues& top, float maximum, int64_t slack) {
    float* const values = top.values;
    const auto keep_above = [&](float limit) {
        int64_t kept = 0;
        for (int64_t i = 0; i < top.count; ++i) {
            const float value = values[i];
            values[kept] = value;
            kept += value > limit;
        }
        top.count = kept;
        top.threshold = limit;
    };
    // At least k values are larger than low (all that stayed reach the threshold), fewer than k are
    // larger than high.
    int64_t low = rank_of(top.threshold) - 1;
    int64_t high = rank_of(maximum);
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const float limit = value_at(middle);
        int32_t larger = 0;
        for (int64_t i = 0; i < top.count; ++i) larger += values[i] > limit;
        if (larger >= top.k && larger <= top.k + slack) return keep_above(limit);
        (larger >= top.k ? low : high) = middle;
    }
    // The values larger than low but not than high all equal high: as many of them stay as the k
    // have room for.
    keep_above(value_at(high));
    while (top.count < top.k) values[top.count++] = top.threshold;
}

template <class Ops>
QTARGET_TOP_FN void enter(TopValues& top, const float* values, int64_t count, float maximum) {
    for (int64_t start = 0; start < count; start += kTopGroup) {
        const int64_t left = count - start;
        top.count += Ops::above(values + start, left < kTopGroup ? left : kTopGroup, top.threshold,
                                top.values + top.count);
        if (top.count >= top_limit(top.k)) select_largest(top, maximum, top.k / 4);
    }
}

// Writes the largest values, descending, then -inf up to `length`.
QTARGET_TOP_FN void write_largest(TopValues& top, float maximum, int64_t length, float* out) {
    if (top.count > top.k) select_largest(top, maximum, 0);
    sort_descending(top.values, top.count);
    std::memcpy(out, top.values, top.count * sizeof(float));
    for (int64_t i = top.count; i < length; ++i) out[i] = lowest<float>();
}

}  // namespace qtarget
