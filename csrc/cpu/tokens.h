// Entry points of the per-token arithmetic on the CPU.
#pragma once

#include "../token_math.h"

namespace qtarget {

void cpu_merge(const MergeArgs& args, int num_threads);
void cpu_weigh(const WeighArgs& args, int num_threads);
void cpu_chain(const ChainArgs& args, int num_threads);

// Writes which labels are not ignore_index. The position of the first of these that is none of the
// vocabulary's, -1 where there is none.
int64_t cpu_supervised(const int64_t* labels, int64_t count, int64_t vocab_size,
                       int64_t ignore_index, bool* out);

}  // namespace qtarget
