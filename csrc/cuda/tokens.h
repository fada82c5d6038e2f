// The launchers of the per-token arithmetic.
#pragma once

#include <cuda_runtime.h>

#include "../token_math.h"

namespace qtarget {

void launch_merge(const MergeArgs& args, cudaStream_t stream);
void launch_weigh(const WeighArgs& args, cudaStream_t stream);
void launch_chain(const ChainArgs& args, cudaStream_t stream);

}  // namespace qtarget
