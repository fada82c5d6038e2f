#include "dispatch.h"

#include <omp.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <stdexcept>

#include "top_k.h"
#include "variants.h"

namespace qtarget {
namespace {

struct Isa {
    const char* name;
    const RowFunctions* rows;
};

constexpr int64_t kSerialElements = 1 << 15;  // below this a thread team costs more than it saves

bool processor_has_avx2() {
#if defined(QTARGET_WITH_AVX2)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c");
#else
    return false;
#endif
}

bool processor_has_avx512() {
#if defined(QTARGET_WITH_AVX512)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
    return false;
#endif
}

#if defined(QTARGET_WITH_AVX512)
bool processor_has_avx512_bf16() {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16");
}
#endif

// Slowest first.
const Isa kIsas[] = {
    {"scalar", &kScalarRows},
#if defined(QTARGET_WITH_AVX2)
    {"avx2", &kAvx2Rows},
#endif
#if defined(QTARGET_WITH_AVX512)
    {"avx512", &kAvx512Rows},
#endif
};

bool processor_has(const std::string& name) {
    return name == "scalar" || (name == "avx2" && processor_has_avx2()) ||
           (name == "avx512" && processor_has_avx512());
}

const Isa* find_isa(const std::string& name, const char* source) {
    if (name != "scalar" && name != "avx2" && name != "avx512") {
        throw std::invalid_argument(std::string(source) + name +
                                    ": unknown instruction set, expected scalar, avx2 or avx512");
    }
    for (const Isa& isa : kIsas) {
        if (name == isa.name && processor_has(name)) return &isa;
    }
    throw std::invalid_argument(std::string(source) + name +
                                ": this processor or this build does not have it, use scalar");
}

const Isa* default_isa() {
    if (const char* const name = std::getenv("QTARGET_CPU_ISA"))
        return find_isa(name, "QTARGET_CPU_ISA=");
    const Isa* best = nullptr;
    for (const Isa& isa : kIsas) {
        if (processor_has(isa.name)) best = &isa;
    }
    return best;
}

std::atomic<const Isa*> chosen{nullptr};

const Isa& current_isa() {
    const Isa* isa = chosen.load();
    if (isa == nullptr) {
        isa = default_isa();
        chosen.store(isa);
    }
    return *isa;
}

// Rows go out one at a time: ignored rows cost nothing and lie together (prompts), so equal shares
// would be unequal. function(row, thread).
template <class Function>
void for_rows(const ShardArgs& shard, int num_threads, const Function& function) {
    const int64_t rows = shard.rows;
    const bool parallel =
        num_threads > 1 && rows > 1 && rows * shard.valid_columns > kSerialElements;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads) if (parallel)
    for (int64_t row = 0; row < rows; ++row) function(row, omp_get_thread_num());
}

}  // namespace

#if defined(QTARGET_WITH_AVX512)
const bool kHasAvx512Bf16 = processor_has_avx512_bf16();
#endif

std::vector<std::string> compiled_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : kIsas) names.push_back(isa.name);
    return names;
}

std::string cpu_isa() {
    return current_isa().name;
}

void set_cpu_isa(const std::string& name) {
    chosen.store(name == "auto" ? default_isa() : find_isa(name, ""));
}

void cpu_partial_statistics(const StatisticsArgs& args, int num_threads) {
    const auto row_statistics = current_isa().rows->statistics[args.shard.num_residuals];
    // Allocated here: a thread of the team could not report that there is no memory.
    const int64_t room = args.layout.top_k > 0 ? top_room(top_count(args)) : 0;
    const std::unique_ptr<float[]> workspace(new float[num_threads * room]);
    for_rows(args.shard, num_threads, [&](int64_t row, int thread) {
        row_statistics(args, row, workspace.get() + thread * room);
    });
}

void cpu_divergence_sums(const DivergenceArgs& args, int num_threads) {
    const auto row_divergence = current_isa().rows->divergence;
    for_rows(args.shard, num_threads, [&](int64_t row, int) { row_divergence(args, row); });
}

void cpu_logit_gradient(const GradientArgs& args, int num_threads) {
    const auto row_gradient = current_isa().rows->gradient;
    for_rows(args.shard, num_threads, [&](int64_t row, int) { row_gradient(args, row); });
}

}  // namespace qtarget
