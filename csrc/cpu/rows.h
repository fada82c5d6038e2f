// One row of each kernel, written once over a type V of vector operations (blocks.h).
//
// A row is visited in blocks that fit the first-level cache: a block's sums are taken in float32
// lanes, centred on the largest value before it, and folded into double. Where a block rises far
// above that centre, the row's sums are moved to its maximum and the block's are taken again.
#pragma once

#include <cstring>
#include <type_traits>

#include "../core.h"
#include "blocks.h"
#include "top_k.h"

namespace qtarget {

// A block of the logits and one of the teacher stay in the first-level cache: 8 KiB.
constexpr int64_t kBlock = 1024;

// How far above their centre values may lie: the squares of weights up to e^8 add up in float32.
constexpr double kSlack = 8.0;

// A gradient of this many bytes is written past the caches, which could not keep it.
constexpr int64_t kStreamBytes = int64_t{1} << 24;

// One block of float32.
struct alignas(64) Block {
    float values[kBlock];
};

template <Dtype D>
using DtypeTag = std::integral_constant<Dtype, D>;

// function(tag): the dtype as a constant.
template <class Function>
QTARGET_FN auto with_dtype(Dtype dtype, const Function& function) {
    switch (dtype) {
        case Dtype::kFloat32:
            return function(DtypeTag<Dtype::kFloat32>());
        case Dtype::kBFloat16:
            return function(DtypeTag<Dtype::kBFloat16>());
        default:
            return function(DtypeTag<Dtype::kFloat16>());
    }
}

// function(logits' tag, teacher's tag). Blocks of the teacher are float32 where it has another
// dtype than the logits: see teacher_block.
template <class Function>
QTARGET_FN auto with_dtypes(const ShardArgs& shard, bool with_teacher, const Function& function) {
    return with_dtype(shard.logits.dtype, [&](auto z) {
        if (with_teacher && shard.teacher.dtype != z.value)
            return function(z, DtypeTag<Dtype::kFloat32>());
        return function(z, z);
    });
}

// function(tag, tag): the number of a gradient's terms, and whether it has a divergence's, as constants.
template <class Function>
QTARGET_FN void with_terms(int terms, bool diverges, const Function& function) {
    static_assert(kMaxResiduals == 2, "one case for each number");
    const auto with_number = [&](auto tag) {
        switch (terms) {
            case 0:
                return function(std::integral_constant<int, 0>(), tag);
            case 1:
                return function(std::integral_constant<int, 1>(), tag);
            default:
                return function(std::integral_constant<int, 2>(), tag);
        }
    };
    diverges ? with_number(std::true_type()) : with_number(std::false_type());
}

QTARGET_FN char* element(const MatrixView& matrix, int64_t row, int64_t column) {
    return static_cast<char*>(matrix.data) +
           (row * matrix.row_stride + column) * size_of(matrix.dtype);
}

QTARGET_FN float read_element(const MatrixView& matrix, int64_t row, int64_t column) {
    return with_dtype(matrix.dtype,
                      [&](auto tag) { return read<tag.value>(element(matrix, row, column)); });
}

// The teacher's columns of a block in dtype T: its own, or float32 (a copy where it is not).
template <class V, Dtype T>
QTARGET_FN const char* teacher_block(const MatrixView& teacher, int64_t row, int64_t start,
                                     int64_t count, Block& buffer) {
    const char* const source = element(teacher, row, start);
    if (teacher.dtype == T) return source;
    with_dtype(teacher.dtype, [&](auto tag) {
        Blocks<V, V::kSumsInFlight>::template widen<tag.value>(source, count, buffer.values);
    });
    return reinterpret_cast<const char*>(buffer.values);
}

QTARGET_FN bool is_uniform(Residual residual) {
    return residual.a == 0.0f && residual.b == 0.0f;
}

QTARGET_FN bool reads_teacher(const ShardArgs& shard) {
    bool reads = false;
    for (int r = 0; r < shard.num_residuals; ++r) reads |= shard.residuals[r].b != 0.0f;
    return reads;
}

// One visit of the row: its sums, centred on its maxima, and its largest logits.
template <class V, int R, Dtype Z, Dtype T>
static void row_sums(const StatisticsArgs& args, int64_t row, TopValues& top,
                     RowSums<double, R, true, true, true>& sums) {
    using Ops = Blocks<V, V::kSumsInFlight>;
    static_assert(kBlock % Ops::kStep == 0, "only a row's last block has columns beyond");
    const ShardArgs& shard = args.shard;
    const Layout& layout = args.layout;
    const bool with_teacher = reads_teacher(shard);
    Block t_buffer, wide_buffer;
    [[maybe_unused]] const typename V::Mode mode;
    // In float32, which subnormal maxima survive in this mode.
    float z_max = lowest<float>();
    float u_max[R > 0 ? R : 1];
    for (float& maximum : u_max) maximum = lowest<float>();
    for (int64_t start = 0; start < shard.valid_columns; start += kBlock) {
        const int64_t left = shard.valid_columns - start;
        const int64_t count = left < kBlock ? left : kBlock;
        const char* const z = element(shard.logits, row, start);
        const auto base_block = [&] {
            const float z_centre = static_cast<float>(centre(sums.m));
            return layout.collision ? Ops::template base_sums<Z, true>(z, count, z_centre)
                                    : Ops::template base_sums<Z, false>(z, count, z_centre);
        };
        BaseSums base = base_block();
        if (base.m > sums.m + kSlack) {
            raise_base(sums, static_cast<double>(base.m));
            base = base_block();
        }
        z_max = larger(base.m, z_max);
        [[maybe_unused]] const double covered = sums.s;
        // What the layout leaves out is 0 in the block's sums; moving a 0 costs nothing.
        sums.s += base.s;
        sums.e += base.e;
        sums.c += base.c;
        if (layout.top_k > 0 && base.m > top.threshold) {
            Ops::template widen<Z>(z, count, wide_buffer.values);
            enter<V>(top, wide_buffer.values, count, z_max);
        }
        if (R == 0) continue;
        const float z_centre = static_cast<float>(centre(sums.m));
        const char* const t =
            with_teacher ? teacher_block<V, T>(shard.teacher, row, start, count, t_buffer) : z;
        for (int r = 0; r < R; ++r) {
            const float a = shard.residuals[r].a, b = shard.residuals[r].b;
            ResidualSums<double, true>& acc = sums.residual[r];
            // y of a uniform residual is 0: u is its own maximum everywhere.
            if (is_uniform(shard.residuals[r])) {
                // u = 0 in every valid column: weight 1, no exponential.
                acc.m = u_max[r] = 0.0f;
                acc.s += static_cast<double>(count);
                acc.x += Ops::template uniform_cross<Z>(z, count, z_centre);
                continue;
            }
            const auto residual_block = [&] {
                const float u_centre = static_cast<float>(centre(acc.m));
                return layout.residual_entropy ? Ops::template residual_sums<Z, T, true>(
                                                     a, b, z, t, count, u_centre, z_centre)
                                               : Ops::template residual_sums<Z, T, false>(
                                                     a, b, z, t, count, u_centre, z_centre);
            };
            ResidualBlockSums part = residual_block();
            if (part.m > acc.m + kSlack) {
                raise_residual(sums, r, static_cast<double>(part.m), covered);
                part = residual_block();
            }
            u_max[r] = larger(part.m, u_max[r]);
            acc.s += part.s;
            acc.x += part.x;
            acc.h += part.h;
            if (layout.reverse_cross && r == 0) {
                const float u_centre = static_cast<float>(centre(acc.m));
                sums.y += Ops::template reverse_cross<Z, T>(a, b, z, t, count, u_centre, z_centre);
            }
        }
    }
    raise_base(sums, static_cast<double>(z_max));
    for (int r = 0; r < R; ++r)
        raise_residual(sums, r, static_cast<double>(u_max[r]), sums.s);
}

// workspace: room for top_room(top_count(args)) where the layout asks for the largest logits.
template <class V, int R>
static void statistics_row(const StatisticsArgs& args, int64_t row, float* workspace) {
    const ShardArgs& shard = args.shard;
    const Layout& layout = args.layout;
    const int64_t width = partial_width(layout, R);
    float* const out = args.out + row * width;
    const int64_t label = shard.labels[row];
    if (label == shard.ignore_index) {
        std::memset(out, 0, sizeof(float) * width);
        return;
    }
    const bool with_teacher = reads_teacher(shard);
    TopValues top = {workspace, top_count(args), 0, lowest<float>()};
    RowSums<double, R, true, true, true> sums;
    clear(sums);
    with_dtypes(shard, with_teacher,
                [&](auto z, auto t) { row_sums<V, R, z.value, t.value>(args, row, top, sums); });
    const int64_t column = label - shard.vocab_start;
    float label_logit = 0.0f;
    float label_teacher = 0.0f;
    if (column >= 0 && column < shard.valid_columns) {
        label_logit = read_element(shard.logits, row, column);
        if (layout.residual_label && with_teacher)
            label_teacher = read_element(shard.teacher, row, column);
    }
    write_partial(sums, label_logit, label_teacher, shard.residuals, layout, out);
    if (layout.top_k > 0) {
        write_largest(top, static_cast<float>(sums.m), layout.top_k, out + top_k_column(layout));
    }
}

// A row's part of the mean of h, and of the divergence.
template <class V>
static void divergence_row(const DivergenceArgs& args, int64_t row) {
    using Ops = Blocks<V, V::kSumsInFlight>;
    [[maybe_unused]] const typename V::Mode mode;
    const ShardArgs& shard = args.shard;
    float* const out = args.out + 2 * row;
    out[0] = out[1] = 0.0f;
    if (shard.labels[row] == shard.ignore_index) return;
    const Residual residual = shard.residuals[0];
    const DivergenceRow terms = {args.divergence.divergence, residual.a, residual.b,
                                 args.max[row],  args.residual_max[row],
                                 args.divergence.offset[row], 0.0f, 0.0f};
    const bool with_teacher = residual.b != 0.0f;
    double slope = 0.0, of_model = 0.0, of_residual = 0.0;
    with_dtypes(shard, with_teacher, [&](auto z_tag, auto t_tag) {
        constexpr Dtype Z = z_tag.value, T = t_tag.value;
        Block t_buffer;
        for (int64_t start = 0; start < shard.valid_columns; start += kBlock) {
            const int64_t left = shard.valid_columns - start;
            const int64_t count = left < kBlock ? left : kBlock;
            const char* const z = element(shard.logits, row, start);
            const char* const t =
                with_teacher ? teacher_block<V, T>(shard.teacher, row, start, count, t_buffer) : z;
            const DivergenceSums part = Ops::template divergence_sums<Z, T>(terms, z, t, count);
            slope += part.slope;
            of_model += part.of_model;
            of_residual += part.of_residual;
        }
    });
    const double scale = args.scale[row], residual_scale = args.residual_scale[row];
    out[0] = static_cast<float>(weighted(scale, slope));
    out[1] =
        static_cast<float>(weighted(scale, of_model) + weighted(residual_scale, of_residual));
}

template <class V, Dtype Z, Dtype T, int Terms, bool Diverges, bool Stream>
static void gradient_columns(const GradientArgs& args, int64_t row, const GradientRow& terms,
                             bool with_teacher) {
    using Ops = Blocks<V, V::kGradientInFlight>;
    const ShardArgs& shard = args.shard;
    Block t_buffer;
    const auto teacher = [&](int64_t start, int64_t count, const char* z) {
        return with_teacher ? teacher_block<V, T>(shard.teacher, row, start, count, t_buffer) : z;
    };
    // Before its logit may be overwritten.
    const int64_t label_column = shard.labels[row] - shard.vocab_start;
    const bool has_label = label_column >= 0 && label_column < shard.valid_columns;
    float at_label = 0.0f;
    if (has_label) {
        const char* const z = element(shard.logits, row, label_column);
        const char* const t = teacher(label_column, 1, z);
        at_label = Ops::template gradient_of<Z, T, Terms, Diverges>(terms, z, t) - args.label_scale[row];
    }
    int64_t count = kBlock;
    if (Stream) {
        // The first block ends where a line of the cache does: stores past the caches are aligned.
        const auto address = reinterpret_cast<uintptr_t>(element(args.out, row, 0));
        count = static_cast<int64_t>(-address % 64) / size_of(Z);
        if (count == 0) count = kBlock;
    }
    for (int64_t start = 0; start < shard.valid_columns; start += count, count = kBlock) {
        const int64_t left = shard.valid_columns - start;
        if (left < count) count = left;
        const char* const z = element(shard.logits, row, start);
        Ops::template gradient<Z, T, Terms, Diverges, Stream>(
            terms, z, teacher(start, count, z), count, element(args.out, row, start));
    }
    if (has_label) write<Z>(element(args.out, row, label_column), at_label);
    if constexpr (Stream) V::fence();
}

template <class V>
static void gradient_row(const GradientArgs& args, int64_t row) {
    [[maybe_unused]] const typename V::Mode mode;
    const ShardArgs& shard = args.shard;
    const int64_t size = size_of(args.out.dtype);

    // A uniform residual is one constant per row; one of scale 0 is left out; the others are terms.
    GradientRow terms = {args.max[row], args.scale[row], 0.0f, 0, {}, {}};
    bool with_teacher = false;
    bool active = terms.scale != 0.0f || args.label_scale[row] != 0.0f;
    for (int r = 0; r < shard.num_residuals; ++r) {
        const float residual_max = args.residual_max[r * shard.rows + row];
        const float residual_scale = args.residual_scale[r * shard.rows + row];
        if (residual_scale == 0.0f) continue;
        active = true;
        if (is_uniform(shard.residuals[r])) {
            terms.constant += softmax_term(-residual_max, residual_scale);
            continue;
        }
        terms.terms[terms.num_terms++] = {shard.residuals[r].a, shard.residuals[r].b, residual_max,
                                          residual_scale};
        with_teacher |= shard.residuals[r].b != 0.0f;
    }
    const DivergenceRows& divergence = args.divergence;
    const bool diverges =
        divergence.divergence.kind != DivergenceKind::kNone && divergence.scale[row] != 0.0f;
    if (diverges) {
        const Residual first = shard.residuals[0];
        terms.divergence = {divergence.divergence,   first.a,
                            first.b,                 args.max[row],
                            args.residual_max[row],  divergence.offset[row],
                            divergence.mean[row],    divergence.scale[row]};
        active = true;
        with_teacher |= first.b != 0.0f;
    }
    if (shard.labels[row] == shard.ignore_index || !active) {
        std::memset(element(args.out, row, 0), 0, args.columns * size);
        return;
    }
    const bool stream = V::kStreams && args.out.data != shard.logits.data &&
                        shard.rows * args.columns * size >= kStreamBytes;
    with_dtypes(shard, with_teacher, [&](auto z, auto t) {
        with_terms(terms.num_terms, diverges, [&](auto count, auto with_divergence) {
            if (V::kStreams && stream) {
                gradient_columns<V, z.value, t.value, count.value, with_divergence.value,
                                 V::kStreams>(args, row, terms, with_teacher);
            } else {
                gradient_columns<V, z.value, t.value, count.value, with_divergence.value, false>(
                    args, row, terms, with_teacher);
            }
        });
    });
    if (args.columns > shard.valid_columns) {
        std::memset(element(args.out, row, shard.valid_columns), 0,
                    (args.columns - shard.valid_columns) * size);
    }
}

}  // namespace qtarget
