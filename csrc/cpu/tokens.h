// Entry points of the per-token arithmetic on the CPU.
#pragma once

#include "../token_math.h"

namespace qtarget {

void cpu_merge(const MergeArgs& args, int num_threads);
void cpu_weigh(const WeighArgs& args, int num_threads);
void cpu_chain(const ChainArgs& args, int num_threads);

}  // namespace qtarget
