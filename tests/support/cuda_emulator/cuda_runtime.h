// What the kernels use of CUDA's headers, for a C++ compiler: a GPU of one block at a time, on the CPU.
#pragma once

#include <math.h>
#include <stdint.h>

#include <algorithm>
#include <cstring>
#include <functional>

#define __CUDACC__
#define __CUDA_ARCH__ 900
#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
// One block runs at a time.
#define __shared__ static

using std::max;
using std::min;

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}

using cudaError_t = int;
using cudaStream_t = struct CUstream_st*;
constexpr cudaError_t cudaSuccess = 0;
cudaError_t cudaGetLastError();
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
const char* cudaGetErrorString(cudaError_t error);

namespace emulator {

struct Index {
    unsigned x;
};
extern Index block_index, thread_index;

// What `kernel<<<blocks, threads, 0, stream>>>(args)` is rewritten to. Throws std::runtime_error
// where a thread touches memory that is not there, where a barrier or a shuffle is not reached by
// all, and where the undefined behaviour sanitizer finds something.
void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

void wait_for_block();
uint32_t shuffle_down(uint32_t mask, uint32_t bits, int distance);

}  // namespace emulator

#define blockIdx emulator::block_index
#define threadIdx emulator::thread_index

inline void __syncthreads() {
    emulator::wait_for_block();
}

inline float __shfl_down_sync(uint32_t mask, float value, int distance) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = emulator::shuffle_down(mask, bits, distance);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Out of line, where the compiler cannot fuse them with anything.
float __fadd_rn(float x, float y);
float __fmul_rn(float x, float y);
float __expf(float x);
