// The launchers of each dtype of logits; one source file per dtype, so that they compile side by
// side.
#pragma once

#include <cuda_runtime.h>

#include "../core.h"

namespace qtarget {

void launch_statistics_fp32(const StatisticsArgs& args, cudaStream_t stream);
void launch_statistics_bf16(const StatisticsArgs& args, cudaStream_t stream);
void launch_statistics_fp16(const StatisticsArgs& args, cudaStream_t stream);
void launch_divergence_fp32(const DivergenceArgs& args, cudaStream_t stream);
void launch_divergence_bf16(const DivergenceArgs& args, cudaStream_t stream);
void launch_divergence_fp16(const DivergenceArgs& args, cudaStream_t stream);
void launch_gradient_fp32(const GradientArgs& args, cudaStream_t stream);
void launch_gradient_bf16(const GradientArgs& args, cudaStream_t stream);
void launch_gradient_fp16(const GradientArgs& args, cudaStream_t stream);

}  // namespace qtarget
