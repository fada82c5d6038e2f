// The rows in portable C++: the formulas of row_math.h, column by column.

#include <algorithm>
#include <functional>

#include "rows.h"
#include "variants.h"

namespace qtarget {
namespace {

struct ScalarOps {
    static constexpr int64_t kWidth = 1;

    static void load(const char* source, Dtype dtype, int64_t count, float* values) {
        if (dtype == Dtype::kFloat32) {
            std::memcpy(values, source, count * sizeof(float));
            return;
        }
        for (int64_t k = 0; k < count; ++k) {
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
        for (int64_t k = 0; k < count; ++k) {
            const uint16_t half = dtype == Dtype::kBFloat16 ? float_to_bfloat16(values[k])
                                                            : float_to_float16(values[k]);
            std::memcpy(target + 2 * k, &half, sizeof half);
        }
    }

    static float max(const float* values, int64_t count) {
        float top = lowest<float>();
        for (int64_t k = 0; k < count; ++k) top = larger(values[k], top);
        return top;
    }

    static void combine(float a, float b, const float* z, const float* t, int64_t count, float* u) {
        for (int64_t k = 0; k < count; ++k) u[k] = residual_logit(a, b, z[k], t[k]);
    }

    static int64_t above(const float* values, int64_t count, float threshold, float* hits) {
        int64_t found = 0;
        for (int64_t k = 0; k < count; ++k) {
            if (values[k] > threshold) hits[found++] = values[k];
        }
        return found;
    }

    template <bool Collision>
    static BlockSums base_sums(const float* z, int64_t count, float z_centre) {
        double s = 0.0, e = 0.0, c = 0.0;
        for (int64_t k = 0; k < count; ++k) {
            const float shifted = z[k] - z_centre;
            const float weight = exp_float(shifted);
            s += weight;
            e += weighted(weight, shifted);
            if (Collision) c += static_cast<double>(weight) * weight;
        }
        return {s, e, c};
    }

    template <bool Entropy>
    static ResidualBlockSums residual_sums(const float* u, const float* z, int64_t count,
                                           float u_centre, float z_centre) {
        double s = 0.0, x = 0.0, h = 0.0;
        for (int64_t k = 0; k < count; ++k) {
            const float shifted = u[k] - u_centre;
            const float weight = exp_float(shifted);
            s += weight;
            x += weighted(weight, z[k] - z_centre);
            if (Entropy) h += weighted(weight, shifted);
        }
        return {s, x, h};
    }

    static double uniform_cross(const float* z, int64_t count, float z_centre) {
        double x = 0.0;
        for (int64_t k = 0; k < count; ++k) x += z[k] - z_centre;
        return x;
    }

    template <int Terms>
    static void gradient(const float* z, const float* t, int64_t count, float max, float scale,
                         float constant, const GradientTerm* terms, float* result) {
        for (int64_t k = 0; k < count; ++k) {
            float value = softmax_term(z[k], max, scale) - constant;
            for (int i = 0; i < Terms; ++i) {
                value -= softmax_term(residual_logit(terms[i].a, terms[i].b, z[k], t[k]),
                                      terms[i].max, terms[i].scale);
            }
            result[k] = value;
        }
    }
};

}  // namespace

void sort_descending(float* values, int64_t count) {
    std::sort(values, values + count, std::greater<float>());
}

const RowFunctions kScalarRows = {
    {statistics_row<ScalarOps, 0>, statistics_row<ScalarOps, 1>, statistics_row<ScalarOps, 2>},
    gradient_row<ScalarOps>,
};

}  // namespace qtarget
