// One row of each kernel, written once over a set of vector operations.
//
// A row is visited in blocks that fit the first-level cache: the block is loaded (and widened to
// float32), its maximum found, the row's sums moved to the new maximum, and the block's sums taken
// in float32 lanes and folded into double.
//
// Ops provides, for float32 arrays whose length is a multiple of Ops::kWidth (the tail holds -inf,
// which has no weight):
//   load, store, max, above, combine, base_sums, residual_sums, uniform_cross, gradient.
#pragma once

#include <cstring>

#include "../core.h"
#include "convert.h"
#include "top_k.h"

namespace qtarget {

// Four float32 arrays of this many columns are alive at once: 16 KiB.
constexpr int64_t kBlock = 1024;

struct alignas(64) Block {
    float values[kBlock];
};

struct BlockSums {
    double s, e, c;
};

struct ResidualBlockSums {
    double s, x, h;
};

// The operands that one residual really uses in the gradient, with its per-row numbers.
struct GradientTerm {
    float a, b, max, scale;
};

QTARGET_FN int64_t element_size(Dtype dtype) {
    return dtype == Dtype::kFloat32 ? 4 : 2;
}

QTARGET_FN char* element(const MatrixView& matrix, int64_t row, int64_t column) {
    return static_cast<char*>(matrix.data) +
           (row * matrix.row_stride + column) * element_size(matrix.dtype);
}

QTARGET_FN float read_element(const MatrixView& matrix, int64_t row, int64_t column) {
    const char* const source = element(matrix, row, column);
    float value;
    uint16_t half;
    switch (matrix.dtype) {
        case Dtype::kFloat32:
            std::memcpy(&value, source, sizeof value);
            return value;
        case Dtype::kBFloat16:
            std::memcpy(&half, source, sizeof half);
            return bfloat16_to_float(half);
        default:
            std::memcpy(&half, source, sizeof half);
            return float16_to_float(half);
    }
}

QTARGET_FN int64_t padded_length(int64_t count, int64_t width) {
    return (count + width - 1) / width * width;
}

QTARGET_FN void pad(float* values, int64_t count, int64_t padded) {
    for (int64_t k = count; k < padded; ++k) values[k] = lowest<float>();
}

template <class Ops>
QTARGET_FN const float* load_block(const MatrixView& matrix, int64_t row, int64_t start,
                                   int64_t count, Block& buffer) {
    const char* const source = element(matrix, row, start);
    if (matrix.dtype == Dtype::kFloat32 && count % Ops::kWidth == 0)
        return reinterpret_cast<const float*>(source);
    Ops::load(source, matrix.dtype, count, buffer.values);
    pad(buffer.values, count, padded_length(count, Ops::kWidth));
    return buffer.values;
}

QTARGET_FN bool is_uniform(Residual residual) {
    return residual.a == 0.0f && residual.b == 0.0f;
}

QTARGET_FN bool reads_teacher(const ShardArgs& shard) {
    bool reads = false;
    for (int r = 0; r < shard.num_residuals; ++r) reads |= shard.residuals[r].b != 0.0f;
    return reads;
}

// workspace: room for top_room(top_count(args)) where the layout asks for the largest logits.
template <class Ops, int R>
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
    Block z_buffer, t_buffer, u_buffer[R > 0 ? R : 1];
    TopValues top = {workspace, top_count(args), 0, lowest<float>()};
    // What the layout leaves out is left out of each block's sums; moving a 0 costs nothing.
    RowSums<double, R, true, true> sums;
    clear(sums);
    for (int64_t start = 0; start < shard.valid_columns; start += kBlock) {
        const int64_t left = shard.valid_columns - start;
        const int64_t count = left < kBlock ? left : kBlock;
        const int64_t padded = padded_length(count, Ops::kWidth);
        const float* const z = load_block<Ops>(shard.logits, row, start, count, z_buffer);
        const float* const t =
            with_teacher ? load_block<Ops>(shard.teacher, row, start, count, t_buffer) : z;
        const float z_max = Ops::max(z, padded);
        raise_base(sums, static_cast<double>(z_max));
        const float z_centre = static_cast<float>(centre(sums.m));
        const BlockSums block = layout.collision
                                    ? Ops::template base_sums<true>(z, padded, z_centre)
                                    : Ops::template base_sums<false>(z, padded, z_centre);
        sums.s += block.s;
        sums.e += block.e;
        sums.c += block.c;
        if (layout.top_k > 0 && z_max > top.threshold)
            enter<Ops>(top, z, padded, static_cast<float>(sums.m));
        for (int r = 0; r < R; ++r) {
            const Residual residual = shard.residuals[r];
            ResidualSums<double, true>& acc = sums.residual[r];
            if (is_uniform(residual)) {
                // u = 0 in every valid column: weight 1, no exponential.
                acc.m = 0.0;
                acc.s += static_cast<double>(count);
                acc.x += Ops::uniform_cross(z, count, z_centre);
                continue;
            }
            const bool plain_teacher = residual.a == 0.0f && residual.b == 1.0f;
            const float* u = t;
            if (!plain_teacher) {
                Ops::combine(residual.a, residual.b, z, t, padded, u_buffer[r].values);
                pad(u_buffer[r].values, count, padded);
                u = u_buffer[r].values;
            }
            raise_residual(acc, static_cast<double>(Ops::max(u, padded)));
            const float u_centre = static_cast<float>(centre(acc.m));
            const ResidualBlockSums part =
                layout.residual_entropy
                    ? Ops::template residual_sums<true>(u, z, padded, u_centre, z_centre)
                    : Ops::template residual_sums<false>(u, z, padded, u_centre, z_centre);
            acc.s += part.s;
            acc.x += part.x;
            acc.h += part.h;
        }
    }
    const int64_t column = label - shard.vocab_start;
    float label_logit = 0.0f;
    float label_residual[R > 0 ? R : 1] = {};
    if (column >= 0 && column < shard.valid_columns) {
        label_logit = read_element(shard.logits, row, column);
        const bool wanted = layout.residual_label && with_teacher;
        const float t = wanted ? read_element(shard.teacher, row, column) : 0.0f;
        for (int r = 0; r < R; ++r) {
            label_residual[r] =
                residual_logit(shard.residuals[r].a, shard.residuals[r].b, label_logit, t);
        }
    }
    write_partial(sums, label_logit, label_residual, layout, out);
    if (layout.top_k > 0) {
        write_largest(top, static_cast<float>(sums.m), layout.top_k, out + top_k_column(layout));
    }
}

template <class Ops>
static void gradient_row(const GradientArgs& args, int64_t row) {
    const ShardArgs& shard = args.shard;
    const int64_t size = element_size(args.out.dtype);
    const float scale = args.scale[row];
    const float label_scale = args.label_scale[row];
    const int64_t label = shard.labels[row];
    const int64_t label_column = label - shard.vocab_start;

    // A uniform residual is one constant per row; one of scale 0 is left out; the others are terms.
    GradientTerm terms[kMaxResiduals];
    int num_terms = 0;
    bool with_teacher = false;
    bool active = scale != 0.0f || label_scale != 0.0f;
    float constant = 0.0f;
    for (int r = 0; r < shard.num_residuals; ++r) {
        const float residual_max = args.residual_max[r * shard.rows + row];
        const float residual_scale = args.residual_scale[r * shard.rows + row];
        if (residual_scale == 0.0f) continue;
        active = true;
        if (is_uniform(shard.residuals[r])) {
            constant += softmax_term(0.0f, residual_max, residual_scale);
            continue;
        }
        terms[num_terms++] = {shard.residuals[r].a, shard.residuals[r].b, residual_max,
                              residual_scale};
        with_teacher |= shard.residuals[r].b != 0.0f;
    }
    if (label == shard.ignore_index || !active) {
        std::memset(element(args.out, row, 0), 0, args.columns * size);
        return;
    }

    Block z_buffer, t_buffer, result_buffer;
    for (int64_t start = 0; start < shard.valid_columns; start += kBlock) {
        const int64_t left = shard.valid_columns - start;
        const int64_t count = left < kBlock ? left : kBlock;
        const int64_t padded = padded_length(count, Ops::kWidth);
        const float* const z = load_block<Ops>(shard.logits, row, start, count, z_buffer);
        const float* const t =
            with_teacher ? load_block<Ops>(shard.teacher, row, start, count, t_buffer) : z;
        char* const target = element(args.out, row, start);
        const bool direct = args.out.dtype == Dtype::kFloat32 && count == padded;
        float* const result = direct ? reinterpret_cast<float*>(target) : result_buffer.values;
        switch (num_terms) {
            case 0:
                Ops::template gradient<0>(z, t, padded, args.max[row], scale, constant, terms,
                                          result);
                break;
            case 1:
                Ops::template gradient<1>(z, t, padded, args.max[row], scale, constant, terms,
                                          result);
                break;
            default:
                Ops::template gradient<2>(z, t, padded, args.max[row], scale, constant, terms,
                                          result);
        }
        if (label_column >= start && label_column < start + count)
            result[label_column - start] -= label_scale;
        if (!direct) Ops::store(result, args.out.dtype, count, target);
    }
    if (args.columns > shard.valid_columns) {
        std::memset(element(args.out, row, shard.valid_columns), 0,
                    (args.columns - shard.valid_columns) * size);
    }
}

}  // namespace qtarget
