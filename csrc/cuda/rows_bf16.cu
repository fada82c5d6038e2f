#include "rows.cuh"
#include "rows.h"

namespace qtarget {

void launch_statistics_bf16(const StatisticsArgs& args, cudaStream_t stream) {
    launch_statistics<__nv_bfloat16>(args, stream);
}

void launch_divergence_bf16(const DivergenceArgs& args, cudaStream_t stream) {
    launch_divergence<__nv_bfloat16>(args, stream);
}

void launch_gradient_bf16(const GradientArgs& args, cudaStream_t stream) {
    launch_gradient<__nv_bfloat16>(args, stream);
}

}  // namespace qtarget
