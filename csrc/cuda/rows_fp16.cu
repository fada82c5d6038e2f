#include "rows.cuh"
#include "rows.h"

namespace qtarget {

void launch_statistics_fp16(const StatisticsArgs& args, cudaStream_t stream) {
    launch_statistics<__half>(args, stream);
}

void launch_divergence_fp16(const DivergenceArgs& args, cudaStream_t stream) {
    launch_divergence<__half>(args, stream);
}

void launch_gradient_fp16(const GradientArgs& args, cudaStream_t stream) {
    launch_gradient<__half>(args, stream);
}

}  // namespace qtarget
