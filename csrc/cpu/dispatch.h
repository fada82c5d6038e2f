// Entry points of the CPU kernels: choose the instruction set, spread the rows over threads.
#pragma once

#include <string>
#include <vector>

#include "../core.h"

namespace qtarget {

// Instruction sets compiled into this binary, slowest first: scalar, avx2, avx512.
std::vector<std::string> compiled_isas();

// The instruction set in use: QTARGET_CPU_ISA where set, else the best that the processor has.
// Throws std::invalid_argument where QTARGET_CPU_ISA names an unknown or unavailable one.
std::string cpu_isa();

// Overrides the choice for this process; "auto" takes it back. Throws like cpu_isa().
void set_cpu_isa(const std::string& name);

void cpu_partial_statistics(const StatisticsArgs& args, int num_threads);
void cpu_divergence_sums(const DivergenceArgs& args, int num_threads);
void cpu_logit_gradient(const GradientArgs& args, int num_threads);

}  // namespace qtarget
