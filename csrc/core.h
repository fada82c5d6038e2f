// Plain-data interface of the kernels: pointers, sizes and strides, no framework type.
//
// partial statistics of a vocabulary shard   logits, teacher -> float32 [rows, partial_width]
// logit gradient                             logits, teacher, per-row scales -> gradient, dtype of
// the logits
#pragma once

#include <cstdint>

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

struct GradientArgs {
    ShardArgs shard;
    int64_t columns;              // columns of out; those from valid_columns on become 0
    const float* max;             // [rows]
    const float* scale;           // [rows]
    const float* label_scale;     // [rows]
    const float* residual_max;    // [R, rows]
    const float* residual_scale;  // [R, rows]
    MatrixView out;               // dtype of logits; may be logits itself
};

}  // namespace qtarget
