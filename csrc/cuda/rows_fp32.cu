#include "rows.cuh"
#include "rows.h"

namespace qtarget {

void launch_statistics_fp32(const StatisticsArgs& args, cudaStream_t stream) {
    launch_statistics<float>(args, stream);
}

void launch_divergence_fp32(const DivergenceArgs& args, cudaStream_t stream) {
    launch_divergence<float>(args, stream);
}

void launch_gradient_fp32(const GradientArgs& args, cudaStream_t stream) {
    launch_gradient<float>(args, stream);
}

}  // namespace qtarget
