// The rows in portable C++, column by column.

#include <algorithm>
#include <functional>

#include "rows.h"
#include "variants.h"

namespace qtarget {
namespace {

struct Scalar {
    using Vec = float;
    static constexpr int64_t kWidth = 1;
    static constexpr int kSumsInFlight = 1;
    static constexpr int kGradientInFlight = 1;
    static constexpr bool kStreams = false;

    struct Mode {};

    struct Sum {
        double value = 0.0;
        void add(Vec v) { value += v; }
        void add_product(Vec a, Vec b) { value += static_cast<double>(a) * b; }
        void add_weighted(Vec weight, Vec v) { value += weighted(weight, v); }
        double total() const { return value; }
    };

    static Vec set(float value) { return value; }
    static Vec fma(Vec a, Vec b, Vec c) { return fmaf(a, b, c); }
    static Vec larger(Vec candidate, Vec current) { return qtarget::larger(candidate, current); }
    static float max_lanes(Vec v) { return v; }

    template <Dtype D>
    static Vec load(const char* at) {
        return read<D>(at);
    }

    template <Dtype D, bool Stream, int U>
    static void store(char* at, const Vec (&v)[U]) {
        write<D>(at, v[0]);
    }

    template <int U>
    static void exp(Vec (&x)[U], Vec (&weight)[U]) {
        x[0] = x[0] < kLowestExponent ? kLowestExponent : x[0];
        exp_alone(x, weight);
    }

    template <int U>
    static void exp_alone(const Vec (&x)[U], Vec (&weight)[U]) {
        weight[0] = expf(x[0]);
    }

    static Vec exponential(Vec x) { return expf(x); }
    static Vec logarithm(Vec x) { return logf(x); }

    static int64_t above(const float* values, int64_t count, float threshold, float* hits) {
        int64_t found = 0;
        for (int64_t k = 0; k < count; ++k) {
            if (values[k] > threshold) hits[found++] = values[k];
        }
        return found;
    }
};

}  // namespace

void sort_descending(float* values, int64_t count) {
    std::sort(values, values + count, std::greater<float>());
}

const RowFunctions kScalarRows = {
    {statistics_row<Scalar, 0>, statistics_row<Scalar, 1>, statistics_row<Scalar, 2>},
    divergence_row<Scalar>,
    gradient_row<Scalar>,
};

}  // namespace qtarget
