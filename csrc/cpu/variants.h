// The row functions of every instruction set; this file's declarations are all that the dispatcher
// knows of them.
#pragma once

#include "../core.h"

namespace qtarget {

struct RowFunctions {
    // Index: number of residuals.
    void (*statistics[kMaxResiduals + 1])(const StatisticsArgs&, int64_t row, float* workspace);
    void (*divergence)(const DivergenceArgs&, int64_t row);
    void (*gradient)(const GradientArgs&, int64_t row);
};

extern const RowFunctions kScalarRows;
#if defined(QTARGET_WITH_AVX2)
extern const RowFunctions kAvx2Rows;
#endif
#if defined(QTARGET_WITH_AVX512)
extern const RowFunctions kAvx512Rows;
// Whether the processor converts to bfloat16 itself.
extern const bool kHasAvx512Bf16;
#endif

}  // namespace qtarget
