// Plain-data interface of the kernels: pointers, sizes and strides, no framework type.
//
// partial statistics of a vocabulary shard   logits, teacher -> float32 [rows, partial_width]
// sums of a divergence over a shard          logits, teacher, per-row scales -> float32 [rows, 2]
// logit gradient                             logits, teacher, per-row scales -> gradient, dtype of
// the logits
#pragma once

#include <cstdint>

#include "divergence_math.h"
#include "row_math.h"

namespace qtarget {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A matrix whose columns are adjacent; the row stride counts elements and may be anything.
struct MatrixView {
    void* data;
    Dtype dtype;
    int64_t row_stride;
};

// What both kernels read. Columns from valid_columns on are padding: never read.
struct ShardArgs {
    MatrixView logits;
    MatrixView teacher;     // data may be null where no residual has b != 0
    const int64_t* labels;  // [rows], global ids
    int64_t rows;
    int64_t valid_columns;
    int64_t vocab_start;  // global id of column 0
    int64_t ignore_index;
    int num_residuals;
    Residual residuals[kMaxResiduals];
};

struct StatisticsArgs {
    ShardArgs shard;
    Layout layout;
    float* out;  // [rows, partial_width(layout, num_residuals)], contiguous
};

// A row's numbers of a divergence, from the merged sums.
struct DivergenceRows {
    Divergence divergence;
    const float* offset;  // [rows], log sum_exp of z less that of the first residual's u
    const float* mean;    // [rows], of h under p; the gradient's alone
    const float* scale;   // [rows], of exp(z - max); the gradient's alone
};

struct DivergenceArgs {
    ShardArgs shard;
    const float* max;             // [rows]
    const float* scale;           // [rows], 1 / sum_exp
    const float* residual_max;    // [rows], of the first residual
    const float* residual_scale;  // [rows]
    DivergenceRows divergence;
    float* out;  // [rows, 2]: this shard's part of the mean of h under p, and of the divergence
};

struct GradientArgs {
    ShardArgs shard;
    int64_t columns;              // columns of out; those from valid_columns on become 0
    const float* max;             // [rows]
    const float* scale;           // [rows]
    const float* label_scale;     // [rows]
    const float* residual_max;    // [R, rows]
    const float* residual_scale;  // [R, rows]
    DivergenceRows divergence;    // of kind kNone: nothing of it is read
    MatrixView out;               // dtype of logits; may be logits itself
};

}  // namespace qtarget
