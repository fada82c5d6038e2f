// The loops over one block of a row, written once over a type V of vector operations:
//
//   Vec, kWidth, set, load<Dtype>, fma, larger, max_lanes, above
//   store<Dtype, Stream>  of U vectors; Stream: past the caches, to an aligned address
//   fence                 after the last store past the caches, so that other threads see them
//   Sum                   adds up many Vecs; add_weighted: 0 * -inf is 0
//   exp                   of U vectors, up to e^80; 0 at -inf, NaN at NaN. Raises x where its
//                         exponential is 0: x times that is then 0
//   exp_alone             the same, of an x that does not matter afterwards
//   exponential, logarithm   of one vector: see divergence_math.h
//   Mode                  lives while a row is worked on
//
// Columns are read in their own dtype and widened in registers, U vectors at a time: an exponential
// is a chain of dependent instructions, and several chains side by side keep the processor busy.
// Where a block's length is no multiple of kStep, its last columns are worked on in a padded copy.
#pragma once

#include <cstring>

#include "../core.h"
#include "convert.h"

namespace qtarget {

#define QTARGET_BLOCK_FN static __attribute__((noinline))

// The exponential of this is 0 in float32.
constexpr float kLowestExponent = -120.0f;

struct BaseSums {
    float m;  // the largest of the block; s, e, c are centred on what the caller gave
    double s, e, c;
};

struct ResidualBlockSums {
    float m;  // as above
    double s, x, h;
};

struct DivergenceSums {
    double slope, of_model, of_residual;  // of exp(z - max) h and A, of exp(u - max) B
};

// A row's numbers of a divergence from u = a z + b t.
struct DivergenceRow {
    Divergence divergence;
    float a, b, max, residual_max, offset;
    float mean, scale;  // the gradient's alone
};

// One residual's part of a row's gradient.
struct GradientTerm {
    float a, b, max, scale;
};

struct GradientRow {
    float max, scale;
    float constant;  // sum of the uniform residuals' terms
    int num_terms;
    GradientTerm terms[kMaxResiduals];
    DivergenceRow divergence;
};

// residual_exponent (row_math.h) of vectors.
template <class V, class Vec>
QTARGET_FN Vec residual_vector(float a, float b, float centre, Vec z, Vec t) {
    if (b == 0.0f)
        return a == 0.0f ? V::set(-centre) : V::fma(V::set(a), z, V::set(-centre));
    if (a == 0.0f) return V::fma(V::set(b), t, V::set(-centre));
    const Vec az = V::larger(V::set(kLowestProduct), V::set(a) * z);
    const Vec sum = az - V::set(centre);
    const Vec of_centre = sum - az;
    const Vec of_az = sum - of_centre;
    const Vec lost = (az - of_az) - (V::set(centre) + of_centre);
    return V::fma(V::set(b), t, sum) + (lost + V::fma(V::set(a), z, V::set(0.0f) - az));
}

template <class V, int U>
struct Blocks {
    using Vec = typename V::Vec;
    using Sum = typename V::Sum;
    static constexpr int64_t kWidth = V::kWidth;
    static constexpr int64_t kStep = kWidth * U;

    // The columns of a step that lie in the row, and `rest` in the others.
    template <Dtype D>
    struct Padded {
        alignas(64) char bytes[kStep * size_of(D)];
        Padded(const char* source, int64_t count, float rest) {
            for (int64_t k = 0; k < kStep; ++k) write<D>(bytes + k * size_of(D), rest);
            std::memcpy(bytes, source, count * size_of(D));
        }
    };

    // step(z, t, column) for every kStep columns, at last for a copy with rest in what is beyond.
    template <Dtype Z, Dtype T, class Step>
    QTARGET_FN void visit(const char* z, const char* t, int64_t count, float z_rest, float t_rest,
                          const Step& step) {
        int64_t k = 0;
        for (; k + kStep <= count; k += kStep) step(z + k * size_of(Z), t + k * size_of(T), k);
        if (k < count) {
            step(Padded<Z>(z + k * size_of(Z), count - k, z_rest).bytes,
                 Padded<T>(t + k * size_of(T), count - k, t_rest).bytes, k);
        }
    }

    template <Dtype D>
    QTARGET_FN void load(const char* at, Vec (&values)[U]) {
        for (int i = 0; i < U; ++i) values[i] = V::template load<D>(at + i * kWidth * size_of(D));
    }

    // The values in float32, -inf up to the next multiple of kStep.
    template <Dtype D>
    QTARGET_BLOCK_FN void widen(const char* source, int64_t count, float* wide) {
        visit<D, D>(source, source, count, lowest<float>(), lowest<float>(),
                    [&](const char* at, const char*, int64_t k) {
                        Vec values[U];
                        load<D>(at, values);
                        V::template store<Dtype::kFloat32, false>(reinterpret_cast<char*>(wide + k),
                                                                  values);
                    });
    }

    template <Dtype D, bool Collision>
    QTARGET_BLOCK_FN BaseSums base_sums(const char* z, int64_t count, float z_centre) {
        const Vec origin = V::set(z_centre);
        Vec top = V::set(lowest<float>());
        Sum s, e, c;
        const auto step = [&](const char* at, const char*, int64_t) __attribute__((always_inline)) {
            Vec x[U], w[U];
            load<D>(at, x);
            for (int i = 0; i < U; ++i) top = V::larger(x[i], top);
            for (int i = 0; i < U; ++i) x[i] = x[i] - origin;
            V::exp(x, w);
            for (int i = 0; i < U; ++i) s.add(w[i]);
            for (int i = 0; i < U; ++i) e.add_product(w[i], x[i]);
            if (Collision)
                for (int i = 0; i < U; ++i) c.add_product(w[i], w[i]);
        };
        visit<D, D>(z, z, count, lowest<float>(), lowest<float>(), step);
        return {V::max_lanes(top), s.total(), e.total(), c.total()};
    }

    template <Dtype Z, Dtype T, bool Entropy>
    QTARGET_BLOCK_FN ResidualBlockSums residual_sums(float a, float b, const char* z, const char* t,
                                                     int64_t count, float u_centre,
                                                     float z_centre) {
        const Vec z_origin = V::set(z_centre);
        Vec top = V::set(lowest<float>());
        Sum s, x, h;
        const auto step = [&](const char* z_at, const char* t_at, int64_t)
                              __attribute__((always_inline)) {
                                  Vec logit[U], u[U], w[U];
                                  load<Z>(z_at, logit);
                                  load<T>(t_at, u);
                                  for (int i = 0; i < U; ++i)
                                      u[i] = residual_vector<V>(a, b, u_centre, logit[i], u[i]);
                                  for (int i = 0; i < U; ++i) top = V::larger(u[i], top);
                                  if constexpr (Entropy) {
                                      V::exp(u, w);
                                  } else {
                                      V::exp_alone(u, w);
                                  }
                                  for (int i = 0; i < U; ++i) s.add(w[i]);
                                  for (int i = 0; i < U; ++i)
                                      x.add_weighted(w[i], logit[i] - z_origin);
                                  if (Entropy)
                                      for (int i = 0; i < U; ++i) h.add_product(w[i], u[i]);
                              };
        // u is -inf in the columns beyond, whatever the signs of a and b.
        const float z_rest = a < 0.0f ? -lowest<float>() : lowest<float>();
        const float t_rest = a != 0.0f ? 0.0f : (b < 0.0f ? -lowest<float>() : lowest<float>());
        visit<Z, T>(z, t, count, z_rest, t_rest, step);
        return {u_centre + V::max_lanes(top), s.total(), x.total(), h.total()};
    }

    template <Dtype D>
    QTARGET_BLOCK_FN double uniform_cross(const char* z, int64_t count, float z_centre) {
        const Vec origin = V::set(z_centre);
        Sum x;
        const auto step = [&](const char* at, const char*, int64_t) {
            Vec logit[U];
            load<D>(at, logit);
            for (int i = 0; i < U; ++i) x.add(logit[i] - origin);
        };
        // The centre is a logit, or 0: D holds it exactly, and it adds nothing.
        visit<D, D>(z, z, count, z_centre, z_centre, step);
        return x.total();
    }

    // y of a block: sum exp(z - z_centre) (u - u_centre).
    template <Dtype Z, Dtype T>
    QTARGET_BLOCK_FN double reverse_cross(float a, float b, const char* z, const char* t,
                                          int64_t count, float u_centre, float z_centre) {
        const Vec origin = V::set(z_centre);
        Sum y;
        const auto step = [&](const char* z_at, const char* t_at, int64_t) {
            Vec x[U], u[U], w[U];
            load<Z>(z_at, x);
            load<T>(t_at, u);
            for (int i = 0; i < U; ++i) u[i] = residual_vector<V>(a, b, u_centre, x[i], u[i]);
            for (int i = 0; i < U; ++i) x[i] = x[i] - origin;
            V::exp_alone(x, w);
            for (int i = 0; i < U; ++i) y.add_weighted(w[i], u[i]);
        };
        visit<Z, T>(z, t, count, lowest<float>(), 0.0f, step);
        return y.total();
    }

    // log p - log r of kStep columns, x = z - max and u - its max.
    template <Dtype Z, Dtype T>
    QTARGET_FN void log_ratios(const DivergenceRow& row, const char* z, const char* t,
                               Vec (&ratio)[U], Vec (&x)[U], Vec (&u)[U]) {
        load<Z>(z, x);
        load<T>(t, u);
        for (int i = 0; i < U; ++i)
            u[i] = residual_vector<V>(row.a, row.b, row.residual_max, x[i], u[i]);
        for (int i = 0; i < U; ++i) x[i] = x[i] - V::set(row.max);
        for (int i = 0; i < U; ++i) ratio[i] = x[i] - u[i] - V::set(row.offset);
    }

    template <Dtype Z, Dtype T>
    QTARGET_BLOCK_FN DivergenceSums divergence_sums(const DivergenceRow& given, const char* z,
                                                    const char* t, int64_t count) {
        const DivergenceRow row = given;
        Sum slope, of_model, of_residual;
        const auto step = [&](const char* z_at, const char* t_at, int64_t k) {
            Vec ratio[U], x[U], u[U], p[U], r[U];
            log_ratios<Z, T>(row, z_at, t_at, ratio, x, u);
            V::exp_alone(x, p);
            V::exp_alone(u, r);
            if (k + kStep > count) {
                // The columns beyond have no logit; a residual may have weight in any.
                alignas(64) float weights[kStep];
                char* const at = reinterpret_cast<char*>(weights);
                V::template store<Dtype::kFloat32, false>(at, r);
                for (int64_t beyond = count - k; beyond < kStep; ++beyond) weights[beyond] = 0.0f;
                load<Dtype::kFloat32>(at, r);
            }
            for (int i = 0; i < U; ++i) {
                const auto terms = divergence_terms<V>(row.divergence, ratio[i]);
                slope.add(weighted_value<V>(p[i], terms.slope));
                of_model.add(weighted_value<V>(p[i], terms.of_model));
                of_residual.add(weighted_value<V>(r[i], terms.of_residual));
            }
        };
        visit<Z, T>(z, t, count, lowest<float>(), 0.0f, step);
        return {slope.total(), of_model.total(), of_residual.total()};
    }

    // The gradient of kStep columns, without the label's term.
    template <Dtype Z, Dtype T, int Terms, bool Diverges>
    QTARGET_FN void gradient_step(const GradientRow& row, const char* z, const char* t,
                                  Vec (&value)[U]) {
        const Vec origin = V::set(row.max);
        const Vec mass = V::set(row.scale);
        const Vec flat = V::set(row.constant);
        Vec logit[U], x[U], of_divergence[U];
        load<Z>(z, logit);
        for (int i = 0; i < U; ++i) x[i] = logit[i] - origin;
        V::exp_alone(x, value);
        if constexpr (Diverges) {
            const DivergenceRow& divergence = row.divergence;
            const Vec weight = V::set(divergence.scale), mean = V::set(divergence.mean);
            Vec ratio[U], u[U];
            log_ratios<Z, T>(divergence, z, t, ratio, x, u);
            for (int i = 0; i < U; ++i) {
                const auto terms = divergence_terms<V>(divergence.divergence, ratio[i]);
                of_divergence[i] = weighted_value<V>(value[i] * weight, terms.slope - mean);
            }
        }
        for (int i = 0; i < U; ++i) value[i] = value[i] * mass - flat;
        if constexpr (Diverges)
            for (int i = 0; i < U; ++i) value[i] = value[i] + of_divergence[i];
        for (int n = 0; n < Terms; ++n) {
            const GradientTerm& term = row.terms[n];
            const Vec u_mass = V::set(term.scale);
            Vec teacher[U], w[U];
            load<T>(t, teacher);
            for (int i = 0; i < U; ++i)
                x[i] = residual_vector<V>(term.a, term.b, term.max, logit[i], teacher[i]);
            V::exp_alone(x, w);
            // Not fused: equal terms cancel to exactly 0.
            for (int i = 0; i < U; ++i) value[i] = value[i] - w[i] * u_mass;
        }
    }

    // Stream: past the caches; `out` is then a multiple of 64.
    template <Dtype Z, Dtype T, int Terms, bool Diverges, bool Stream>
    QTARGET_BLOCK_FN void gradient(const GradientRow& terms, const char* z, const char* t,
                                   int64_t count, char* out) {
        const GradientRow row = terms;  // a copy, which no store to `out` can change
        Vec value[U];
        int64_t k = 0;
        for (; k + kStep <= count; k += kStep) {
            gradient_step<Z, T, Terms, Diverges>(row, z + k * size_of(Z), t + k * size_of(T), value);
            V::template store<Z, Stream>(out + k * size_of(Z), value);
        }
        if (k < count) {
            alignas(64) char result[kStep * size_of(Z)];
            const Padded<Z> z_rest(z + k * size_of(Z), count - k, 0.0f);
            const Padded<T> t_rest(t + k * size_of(T), count - k, 0.0f);
            gradient_step<Z, T, Terms, Diverges>(row, z_rest.bytes, t_rest.bytes, value);
            V::template store<Z, false>(result, value);
            std::memcpy(out + k * size_of(Z), result, (count - k) * size_of(Z));
        }
    }

    // One column's gradient in float32, as gradient() has it before rounding.
    template <Dtype Z, Dtype T, int Terms, bool Diverges>
    QTARGET_BLOCK_FN float gradient_of(const GradientRow& row, const char* z, const char* t) {
        const Padded<Z> z_one(z, 1, 0.0f);
        const Padded<T> t_one(t, 1, 0.0f);
        Vec value[U];
        gradient_step<Z, T, Terms, Diverges>(row, z_one.bytes, t_one.bytes, value);
        float values[kStep];
        V::template store<Dtype::kFloat32, false>(reinterpret_cast<char*>(values), value);
        return values[0];
    }
};

}  // namespace qtarget
