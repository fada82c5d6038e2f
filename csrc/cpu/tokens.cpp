#include "tokens.h"

namespace qtarget {
namespace {

// Starting threads takes longer than so many tokens.
constexpr int64_t kSerialTokens = 512;

template <class Args, class Function>
void for_tokens(const Args& args, int num_threads, const Function& function) {
#pragma omp parallel for schedule(static) num_threads(num_threads) if (args.rows > kSerialTokens)
    for (int64_t row = 0; row < args.rows; ++row) function(args, row);
}

}  // namespace

void cpu_merge(const MergeArgs& args, int num_threads) {
    if (args.wide) {
        for_tokens(args, num_threads, merge_token<double>);
    } else {
        for_tokens(args, num_threads, merge_token<float>);
    }
}

void cpu_weigh(const WeighArgs& args, int num_threads) {
    if (args.wide) {
        for_tokens(args, num_threads, weigh_token<double>);
    } else {
        for_tokens(args, num_threads, weigh_token<float>);
    }
}

void cpu_chain(const ChainArgs& args, int num_threads) {
    if (args.wide) {
        for_tokens(args, num_threads, chain_token<double>);
    } else {
        for_tokens(args, num_threads, chain_token<float>);
    }
}

int64_t cpu_supervised(const int64_t* labels, int64_t count, int64_t vocab_size,
                       int64_t ignore_index, bool* out) {
    int64_t wrong = -1;
    for (int64_t row = count - 1; row >= 0; --row) {
        out[row] = labels[row] != ignore_index;
        if (out[row] && (labels[row] < 0 || labels[row] >= vocab_size)) wrong = row;
    }
    return wrong;
}

}  // namespace qtarget
