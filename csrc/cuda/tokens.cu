// The per-token arithmetic: a thread for each token.
#include "tokens.h"

namespace qtarget {
namespace {

constexpr int kTokensPerBlock = 128;

template <class T>
__global__ void __launch_bounds__(kTokensPerBlock) merge_kernel(const MergeArgs args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x;
    if (row < args.rows) merge_token<T>(args, row);
}

template <class T>
__global__ void __launch_bounds__(kTokensPerBlock) weigh_kernel(const WeighArgs args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x;
    if (row < args.rows) weigh_token<T>(args, row);
}

template <class T>
__global__ void __launch_bounds__(kTokensPerBlock) chain_kernel(const ChainArgs args) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kTokensPerBlock + threadIdx.x;
    if (row < args.rows) chain_token<T>(args, row);
}

unsigned blocks_of(int64_t rows) {
    return static_cast<unsigned>((rows + kTokensPerBlock - 1) / kTokensPerBlock);
}

}  // namespace

void launch_merge(const MergeArgs& args, cudaStream_t stream) {
    if (args.wide) {
        merge_kernel<double><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    } else {
        merge_kernel<float><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    }
}

void launch_weigh(const WeighArgs& args, cudaStream_t stream) {
    if (args.wide) {
        weigh_kernel<double><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    } else {
        weigh_kernel<float><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    }
}

void launch_chain(const ChainArgs& args, cudaStream_t stream) {
    if (args.wide) {
        chain_kernel<double><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    } else {
        chain_kernel<float><<<blocks_of(args.rows), kTokensPerBlock, 0, stream>>>(args);
    }
}

}  // namespace qtarget
