// Entry points of the CUDA kernels, callable from files that nvcc does not compile.
#pragma once

#include <cstdint>

#include "../core.h"
#include "../token_math.h"

namespace qtarget {

// Every pointer is device memory of `device`; `stream` is a cudaStream_t of that device.
// Asynchronous: nothing is allocated and nothing waits. Throws std::runtime_error where the launch
// is refused.
void cuda_partial_statistics(const StatisticsArgs& args, int device, uintptr_t stream);
void cuda_divergence_sums(const DivergenceArgs& args, int device, uintptr_t stream);
void cuda_logit_gradient(const GradientArgs& args, int device, uintptr_t stream);
void cuda_merge(const MergeArgs& args, int device, uintptr_t stream);
void cuda_weigh(const WeighArgs& args, int device, uintptr_t stream);
void cuda_chain(const ChainArgs& args, int device, uintptr_t stream);

}  // namespace qtarget
