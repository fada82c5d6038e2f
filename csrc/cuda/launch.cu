#include "launch.h"

#include <climits>
#include <stdexcept>
#include <string>

#include "rows.h"
#include "tokens.h"

namespace qtarget {
namespace {

void check(cudaError_t status) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string("qtarget_megatron: CUDA launch failed: ") +
                                 cudaGetErrorString(status));
    }
}

// This runtime is linked statically: it does not know the current device of the caller's runtime.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_));
        if (device != previous_) {
            check(cudaSetDevice(device));
            changed_ = true;
        }
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
    bool changed_ = false;
};

template <class Args>
using Launcher = void (*)(const Args&, cudaStream_t);

template <class Args>
void launch(Launcher<Args> launcher, const Args& args, int64_t rows, int device, uintptr_t stream) {
    if (rows == 0) return;
    // The grid counts rows in 32 bits.
    if (rows > INT_MAX) throw std::invalid_argument("the CUDA kernels take fewer than 2^31 rows");
    const DeviceGuard guard(device);
    launcher(args, reinterpret_cast<cudaStream_t>(stream));
    check(cudaGetLastError());
}

template <class Args>
void launch(const Launcher<Args> (&by_dtype)[3], const Args& args, int64_t columns, int device,
            uintptr_t stream) {
    // The kernels count a row's packs in 32 bits.
    if (columns > INT_MAX - 64) {
        throw std::invalid_argument("the CUDA kernels take fewer than 2^31 columns");
    }
    launch(by_dtype[static_cast<int>(args.shard.logits.dtype)], args, args.shard.rows, device,
           stream);
}

}  // namespace

void cuda_partial_statistics(const StatisticsArgs& args, int device, uintptr_t stream) {
    const Launcher<StatisticsArgs> by_dtype[] = {launch_statistics_fp32, launch_statistics_bf16,
                                                 launch_statistics_fp16};
    launch(by_dtype, args, args.shard.valid_columns, device, stream);
}

void cuda_divergence_sums(const DivergenceArgs& args, int device, uintptr_t stream) {
    const Launcher<DivergenceArgs> by_dtype[] = {launch_divergence_fp32, launch_divergence_bf16,
                                                 launch_divergence_fp16};
    launch(by_dtype, args, args.shard.valid_columns, device, stream);
}

void cuda_logit_gradient(const GradientArgs& args, int device, uintptr_t stream) {
    const Launcher<GradientArgs> by_dtype[] = {launch_gradient_fp32, launch_gradient_bf16,
                                               launch_gradient_fp16};
    launch(by_dtype, args, args.columns, device, stream);
}

void cuda_merge(const MergeArgs& args, int device, uintptr_t stream) {
    launch(launch_merge, args, args.rows, device, stream);
}

void cuda_weigh(const WeighArgs& args, int device, uintptr_t stream) {
    launch(launch_weigh, args, args.rows, device, stream);
}

void cuda_chain(const ChainArgs& args, int device, uintptr_t stream) {
    launch(launch_chain, args, args.rows, device, stream);
}

}  // namespace qtarget
