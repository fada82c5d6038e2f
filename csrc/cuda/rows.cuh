// One block per row, for one dtype of logits.
//
// A row is read in packs of 16 bytes. Pack p covers columns [p * K - shift, p * K - shift + K),
// where the shift makes every pack but the first and the last an aligned load whatever the row's
// address; partial packs go column by column. Each thread keeps its own sums (row_math.h); warps
// and then the block add them up in a fixed order.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "../core.h"

namespace qtarget {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Sums may stay centred this far below the maximum: exp(4) costs no precision, and moving the
// centre at every new maximum would have some lane of the warp do it in most steps.
constexpr float kSlack = 4.0f;

// exp(x) is 0 in float32 below this; weight * max(x, kFloor) is then 0 and not 0 * -inf.
constexpr float kFloor = -110.0f;

__device__ __forceinline__ float to_float(float value) {
    return value;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 value) {
    return __bfloat162float(value);
}
__device__ __forceinline__ float to_float(__half value) {
    return __half2float(value);
}

template <class T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
    return value;
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
    return __float2bfloat16_rn(value);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
    return __float2half_rn(value);
}

template <class T>
constexpr int kPack = 16 / sizeof(T);

// K values of type T in as few loads as their size allows.
template <class T, int K>
struct alignas(K * sizeof(T) < 16 ? K * sizeof(T) : 16) Values {
    T at[K];
};

template <class T, int K>
__device__ __forceinline__ bool is_aligned(const T* address) {
    return reinterpret_cast<uintptr_t>(address) % alignof(Values<T, K>) == 0;
}

struct Packs {
    int shift;  // columns by which the first pack begins before the row
    int count;
};

template <class T>
__device__ __forceinline__ Packs packs_of(const T* row, int columns) {
    constexpr int K = kPack<T>;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 16 / sizeof(T));
    return {shift, (shift + columns + K - 1) / K};
}

// Columns [start, start + K) as float; those outside of [0, columns) are -inf.
template <class T, int K>
__device__ __forceinline__ void load_values(const T* row, int start, int columns, bool aligned,
                                            float (&values)[K]) {
    if (aligned && start >= 0 && start + K <= columns) {
        const Values<T, K> pack = *reinterpret_cast<const Values<T, K>*>(row + start);
#pragma unroll
        for (int k = 0; k < K; ++k) values[k] = to_float(pack.at[k]);
    } else {
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int column = start + k;
            values[k] = column >= 0 && column < columns ? to_float(row[column]) : -INFINITY;
        }
    }
}

// 16 bytes in one store: an assignment of Values is compiled into one for each element.
template <class T>
__device__ __forceinline__ void store_pack(T* address, const Values<T, kPack<T>>& values) {
    unsigned __int128 bits;
    memcpy(&bits, &values, sizeof bits);
    *reinterpret_cast<unsigned __int128*>(address) = bits;
}

// The teacher's row, whose dtype and alignment may differ from the logits'.
struct TeacherRow {
    const char* data;
    Dtype dtype;
    bool aligned;

    template <class T, int K>
    __device__ __forceinline__ void align(int shift) {
        aligned = is_aligned<T, K>(reinterpret_cast<const T*>(data) - shift);
    }

    template <int K>
    __device__ __forceinline__ void open(const MatrixView& matrix, int64_t row, int shift) {
        dtype = matrix.dtype;
        const int size = dtype == Dtype::kFloat32 ? 4 : 2;
        data = static_cast<const char*>(matrix.data) + row * matrix.row_stride * size;
        if (dtype == Dtype::kFloat32) {
            align<float, K>(shift);
        } else {
            align<__half, K>(shift);
        }
    }

    template <int K>
    __device__ __forceinline__ void load(int start, int columns, float (&values)[K]) const {
        if (dtype == Dtype::kFloat32) {
            load_values<float, K>(reinterpret_cast<const float*>(data), start, columns, aligned,
                                  values);
        } else if (dtype == Dtype::kBFloat16) {
            load_values<__nv_bfloat16, K>(reinterpret_cast<const __nv_bfloat16*>(data), start,
                                          columns, aligned, values);
        } else {
            load_values<__half, K>(reinterpret_cast<const __half*>(data), start, columns, aligned,
                                   values);
        }
    }

    __device__ __forceinline__ float at(int64_t column) const {
        if (dtype == Dtype::kFloat32) return reinterpret_cast<const float*>(data)[column];
        if (dtype == Dtype::kBFloat16)
            return to_float(reinterpret_cast<const __nv_bfloat16*>(data)[column]);
        return to_float(reinterpret_cast<const __half*>(data)[column]);
    }
};

template <class T>
__device__ __forceinline__ T* row_of(const MatrixView& matrix, int64_t row) {
    return static_cast<T*>(matrix.data) + row * matrix.row_stride;
}

template <int K>
__device__ __forceinline__ float max_of(const float (&values)[K]) {
    float top = values[0];
#pragma unroll
    for (int k = 1; k < K; ++k) top = fmaxf(top, values[k]);  // fmaxf passes over NaN
    return top;
}

template <int R, bool Collision, bool Entropy, bool Reverse>
__device__ __forceinline__ RowSums<float, R, Collision, Entropy, Reverse> from_lane(
    const RowSums<float, R, Collision, Entropy, Reverse>& sums, int distance) {
    RowSums<float, R, Collision, Entropy, Reverse> other;
    other.m = __shfl_down_sync(0xffffffffu, sums.m, distance);
    other.s = __shfl_down_sync(0xffffffffu, sums.s, distance);
    other.e = __shfl_down_sync(0xffffffffu, sums.e, distance);
    other.c = Collision ? __shfl_down_sync(0xffffffffu, sums.c, distance) : 0.0f;
    other.y = Reverse ? __shfl_down_sync(0xffffffffu, sums.y, distance) : 0.0f;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        other.residual[r].m = __shfl_down_sync(0xffffffffu, sums.residual[r].m, distance);
        other.residual[r].s = __shfl_down_sync(0xffffffffu, sums.residual[r].s, distance);
        other.residual[r].x = __shfl_down_sync(0xffffffffu, sums.residual[r].x, distance);
        other.residual[r].h =
            Entropy ? __shfl_down_sync(0xffffffffu, sums.residual[r].h, distance) : 0.0f;
    }
    return other;
}

// Lane 0 ends with the sums of the first `lanes` lanes (a power of two).
template <int R, bool Collision, bool Entropy, bool Reverse>
__device__ __forceinline__ void add_lanes(RowSums<float, R, Collision, Entropy, Reverse>& sums,
                                          int lanes) {
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2)
        add(sums, from_lane(sums, distance));
}

// Thread 0 ends with the sums of the block.
template <int R, bool Collision, bool Entropy, bool Reverse>
__device__ __forceinline__ void add_block(RowSums<float, R, Collision, Entropy, Reverse>& sums) {
    __shared__ RowSums<float, R, Collision, Entropy, Reverse> of_warp[kWarps];
    add_lanes(sums, 32);
    if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sums;
    __syncthreads();  // warp 0 reads what the lanes 0 wrote
    if (threadIdx.x < 32) {
        if (threadIdx.x < kWarps) sums = of_warp[threadIdx.x];
        add_lanes(sums, kWarps);
    }
}

// All of a row's partial but its largest logits, which the caller adds.
template <class T, int R, bool Teacher, bool Collision, bool Entropy, bool Reverse>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const StatisticsArgs args) {
    constexpr int K = kPack<T>;
    const int64_t row = blockIdx.x;
    const int64_t width = partial_width(args.layout, R);
    float* const out = args.out + row * width;
    const int64_t label = args.shard.labels[row];
    if (label == args.shard.ignore_index) {
        for (int64_t i = threadIdx.x; i < width; i += kThreads) out[i] = 0.0f;
        return;
    }
    const int columns = static_cast<int>(args.shard.valid_columns);
    const T* const logits = row_of<const T>(args.shard.logits, row);
    const Packs packs = packs_of(logits, columns);
    TeacherRow teacher;
    if (Teacher) teacher.open<K>(args.shard.teacher, row, packs.shift);

    // sums.m is the centre, at most kSlack below the maximum seen so far.
    RowSums<float, R, Collision, Entropy, Reverse> sums;
    clear(sums);
    float z_max = -INFINITY;
    float u_max[R > 0 ? R : 1];
#pragma unroll
    for (int r = 0; r < R; ++r) u_max[r] = -INFINITY;

    for (int pack = threadIdx.x; pack < packs.count; pack += kThreads) {
        const int start = pack * K - packs.shift;
        float z[K], t[K];
        load_values<T, K>(logits, start, columns, true, z);
        if (Teacher) teacher.load<K>(start, columns, t);

        const float z_top = max_of(z);
        z_max = fmaxf(z_max, z_top);
        if (z_top > sums.m + kSlack) raise_base(sums, z_top);
        const float z_centre = centre(sums.m);
        const float covered = sums.s;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const float shifted = z[k] - z_centre;
            const float weight = exp_float(shifted);
            sums.s += weight;
            sums.e = fmaf(weight, fmaxf(shifted, kFloor), sums.e);
            if (Collision) sums.c = fmaf(weight, weight, sums.c);
        }

#pragma unroll
        for (int r = 0; r < R; ++r) {
            const float a = args.shard.residuals[r].a;
            const float b = Teacher ? args.shard.residuals[r].b : 0.0f;
            float exponents[K];
            const auto exponents_from = [&](float from) {
#pragma unroll
                for (int k = 0; k < K; ++k)
                    exponents[k] = residual_exponent(a, b, from, z[k], Teacher ? t[k] : 0.0f);
                if (start >= 0 && start + K <= columns) return;
#pragma unroll
                for (int k = 0; k < K; ++k) {
                    if (start + k < 0 || start + k >= columns) exponents[k] = -INFINITY;
                }
            };
            ResidualSums<float, Entropy>& acc = sums.residual[r];
            exponents_from(centre(acc.m));
            const float u_top = centre(acc.m) + max_of(exponents);
            u_max[r] = fmaxf(u_max[r], u_top);
            if (u_top > acc.m + kSlack) {
                raise_residual(sums, r, u_top, covered);
                exponents_from(centre(acc.m));
            }
            if (Reverse && r == 0) {
                // Columns beyond have no weight, whatever stands in their exponent.
#pragma unroll
                for (int k = 0; k < K; ++k)
                    sums.y += weighted(exp_float(z[k] - z_centre), exponents[k]);
            }
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float weight = exp_float(exponents[k]);
                acc.s += weight;
                acc.x += weighted(weight, z[k] - z_centre);
                if (Entropy) acc.h = fmaf(weight, fmaxf(exponents[k], kFloor), acc.h);
            }
        }
    }

    raise_base(sums, z_max);
#pragma unroll
    for (int r = 0; r < R; ++r) raise_residual(sums, r, u_max[r], sums.s);
    add_block(sums);
    if (threadIdx.x == 0) {
        const int64_t column = label - args.shard.vocab_start;
        float label_logit = 0.0f;
        float label_teacher = 0.0f;
        if (column >= 0 && column < columns) {
            label_logit = to_float(logits[column]);
            if (Teacher && args.layout.residual_label) label_teacher = teacher.at(column);
        }
        write_partial(sums, label_logit, label_teacher, args.shard.residuals, args.layout, out);
    }
}

// The operations that the formulas of a divergence are written over.
struct DeviceNumber {
    __device__ __forceinline__ static float set(float value) {
        return value;
    }
    __device__ __forceinline__ static float exponential(float x) {
        return exp_float(x);
    }
    __device__ __forceinline__ static float logarithm(float x) {
        return logf(x);
    }
};

// A row's part of the mean of h, and of the divergence.
template <class T, bool Teacher>
__global__ void __launch_bounds__(kThreads) divergence_kernel(const DivergenceArgs args) {
    constexpr int K = kPack<T>;
    const ShardArgs& shard = args.shard;
    const int64_t row = blockIdx.x;
    float* const out = args.out + 2 * row;
    if (shard.labels[row] == shard.ignore_index) {
        if (threadIdx.x == 0) out[0] = out[1] = 0.0f;
        return;
    }
    const int columns = static_cast<int>(shard.valid_columns);
    const T* const logits = row_of<const T>(shard.logits, row);
    const Packs packs = packs_of(logits, columns);
    TeacherRow teacher;
    if (Teacher) teacher.open<K>(shard.teacher, row, packs.shift);
    const float a = shard.residuals[0].a;
    const float b = Teacher ? shard.residuals[0].b : 0.0f;
    const float maximum = args.max[row], residual_max = args.residual_max[row];
    const float offset = args.divergence.offset[row];

    float slope = 0.0f, of_model = 0.0f, of_residual = 0.0f;
    for (int pack = threadIdx.x; pack < packs.count; pack += kThreads) {
        const int start = pack * K - packs.shift;
        float z[K], t[K];
        load_values<T, K>(logits, start, columns, true, z);
        if (Teacher) teacher.load<K>(start, columns, t);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (start + k < 0 || start + k >= columns) continue;
            const float x = z[k] - maximum;
            const float u = residual_exponent(a, b, residual_max, z[k], Teacher ? t[k] : 0.0f);
            const auto terms =
                divergence_terms<DeviceNumber>(args.divergence.divergence, x - u - offset);
            const float p = exp_float(x), r = exp_float(u);
            slope += weighted(p, terms.slope);
            of_model += weighted(p, terms.of_model);
            of_residual += weighted(r, terms.of_residual);
        }
    }
    __shared__ float of_warp[3][kWarps];
    float* const sums[3] = {&slope, &of_model, &of_residual};
#pragma unroll
    for (int s = 0; s < 3; ++s) {
        float sum = *sums[s];
#pragma unroll 1
        for (int distance = 16; distance > 0; distance /= 2)
            sum += __shfl_down_sync(0xffffffffu, sum, distance);
        if (threadIdx.x % 32 == 0) of_warp[s][threadIdx.x / 32] = sum;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    float total[3] = {0.0f, 0.0f, 0.0f};
    for (int s = 0; s < 3; ++s)
        for (int warp = 0; warp < kWarps; ++warp) total[s] += of_warp[s][warp];
    const float scale = args.scale[row], residual_scale = args.residual_scale[row];
    out[0] = weighted(scale, total[0]);
    out[1] = weighted(scale, total[1]) + weighted(residual_scale, total[2]);
}

// Exact zeros in columns [begin, end) of a row.
template <class T>
__device__ __forceinline__ void clear_columns(T* row, int begin, int end) {
    constexpr int K = kPack<T>;
    T* const first = row + begin;
    const int columns = end - begin;
    const Packs packs = packs_of(first, columns);
    for (int pack = threadIdx.x; pack < packs.count; pack += kThreads) {
        const int start = pack * K - packs.shift;
        if (start >= 0 && start + K <= columns) {
            *reinterpret_cast<uint4*>(first + start) = make_uint4(0, 0, 0, 0);
        } else {
            for (int column = max(start, 0); column < min(start + K, columns); ++column)
                first[column] = from_float<T>(0.0f);
        }
    }
}

// The logits are not const __restrict__ here: out may be the same memory. Every column is read and
// written by one thread, in that order.
template <class T, int R, bool Teacher, bool Diverges>
__global__ void __launch_bounds__(kThreads) gradient_kernel(const GradientArgs args) {
    constexpr int K = kPack<T>;
    const ShardArgs& shard = args.shard;
    const int64_t row = blockIdx.x;
    const int columns = static_cast<int>(shard.valid_columns);
    const int64_t label = shard.labels[row];
    const float maximum = args.max[row];
    const float scale = args.scale[row];
    const float label_scale = args.label_scale[row];
    float residual_max[R > 0 ? R : 1];
    float residual_scale[R > 0 ? R : 1];
    bool active = scale != 0.0f || label_scale != 0.0f;
    bool needs_teacher = false;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        residual_max[r] = args.residual_max[r * shard.rows + row];
        residual_scale[r] = args.residual_scale[r * shard.rows + row];
        active |= residual_scale[r] != 0.0f;
        needs_teacher |= residual_scale[r] != 0.0f && shard.residuals[r].b != 0.0f;
    }
    const DivergenceRows& divergence = args.divergence;
    const float divergence_scale = Diverges ? divergence.scale[row] : 0.0f;
    const float divergence_offset = Diverges ? divergence.offset[row] : 0.0f;
    const float divergence_mean = Diverges ? divergence.mean[row] : 0.0f;
    active |= divergence_scale != 0.0f;
    needs_teacher |= divergence_scale != 0.0f && shard.residuals[0].b != 0.0f;
    T* const out = row_of<T>(args.out, row);
    if (label == shard.ignore_index || !active) {
        clear_columns(out, 0, static_cast<int>(args.columns));
        return;
    }

    const T* const logits = row_of<const T>(shard.logits, row);
    const Packs packs = packs_of(logits, columns);
    const bool out_aligned = is_aligned<T, K>(out - packs.shift);
    TeacherRow teacher;
    if (Teacher) teacher.open<K>(shard.teacher, row, packs.shift);
    const int64_t label_column = label - shard.vocab_start;

    for (int pack = threadIdx.x; pack < packs.count; pack += kThreads) {
        const int start = pack * K - packs.shift;
        float z[K], t[K], gradient[K];
        load_values<T, K>(logits, start, columns, true, z);
        if (Teacher) {
#pragma unroll
            for (int k = 0; k < K; ++k) t[k] = 0.0f;
            if (needs_teacher) teacher.load<K>(start, columns, t);
        }
#pragma unroll
        for (int k = 0; k < K; ++k) gradient[k] = softmax_term(z[k] - maximum, scale);
        if (Diverges && divergence_scale != 0.0f) {
            const float a = shard.residuals[0].a;
            const float b = Teacher ? shard.residuals[0].b : 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float x = z[k] - maximum;
                const float u =
                    residual_exponent(a, b, residual_max[0], z[k], Teacher ? t[k] : 0.0f);
                const auto terms =
                    divergence_terms<DeviceNumber>(divergence.divergence, x - u - divergence_offset);
                gradient[k] +=
                    weighted(softmax_term(x, divergence_scale), terms.slope - divergence_mean);
            }
        }
#pragma unroll
        for (int r = 0; r < R; ++r) {
            if (residual_scale[r] == 0.0f) continue;
            const float a = shard.residuals[r].a;
            const float b = Teacher ? shard.residuals[r].b : 0.0f;
#pragma unroll
            for (int k = 0; k < K; ++k) {
                const float exponent =
                    residual_exponent(a, b, residual_max[r], z[k], Teacher ? t[k] : 0.0f);
                gradient[k] -= softmax_term(exponent, residual_scale[r]);
            }
        }
        Values<T, K> result;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            if (start + k == label_column) gradient[k] -= label_scale;
            result.at[k] = from_float<T>(gradient[k]);
        }
        if (out_aligned && start >= 0 && start + K <= columns) {
            store_pack(out + start, result);
        } else {
#pragma unroll
            for (int k = 0; k < K; ++k) {
                if (start + k >= 0 && start + k < columns) out[start + k] = result.at[k];
            }
        }
    }
    clear_columns(out, columns, static_cast<int>(args.columns));
}

bool any_teacher(const ShardArgs& shard) {
    bool reads = false;
    for (int r = 0; r < shard.num_residuals; ++r) reads |= shard.residuals[r].b != 0.0f;
    return reads;
}

template <class T, int R, bool Teacher>
void launch_statistics(const StatisticsArgs& args, cudaStream_t stream) {
    const unsigned rows = static_cast<unsigned>(args.shard.rows);
    constexpr bool any = R != 0;
    const bool entropy = any && args.layout.residual_entropy;
    if (any && args.layout.reverse_cross) {
        // What the layout leaves out of all sums is not written.
        statistics_kernel<T, R, Teacher, true, any, any><<<rows, kThreads, 0, stream>>>(args);
    } else if (args.layout.collision && entropy) {
        statistics_kernel<T, R, Teacher, true, any, false><<<rows, kThreads, 0, stream>>>(args);
    } else if (args.layout.collision) {
        statistics_kernel<T, R, Teacher, true, false, false><<<rows, kThreads, 0, stream>>>(args);
    } else if (entropy) {
        statistics_kernel<T, R, Teacher, false, any, false><<<rows, kThreads, 0, stream>>>(args);
    } else {
        statistics_kernel<T, R, Teacher, false, false, false><<<rows, kThreads, 0, stream>>>(args);
    }
}

template <class T>
void launch_statistics(const StatisticsArgs& args, cudaStream_t stream) {
    const bool teacher = any_teacher(args.shard);
    switch (args.shard.num_residuals) {
        case 0:
            launch_statistics<T, 0, false>(args, stream);
            break;
        case 1:
            if (teacher) {
                launch_statistics<T, 1, true>(args, stream);
            } else {
                launch_statistics<T, 1, false>(args, stream);
            }
            break;
        default:
            if (teacher) {
                launch_statistics<T, 2, true>(args, stream);
            } else {
                launch_statistics<T, 2, false>(args, stream);
            }
    }
}

template <class T>
void launch_divergence(const DivergenceArgs& args, cudaStream_t stream) {
    const unsigned rows = static_cast<unsigned>(args.shard.rows);
    if (args.shard.residuals[0].b != 0.0f) {
        divergence_kernel<T, true><<<rows, kThreads, 0, stream>>>(args);
    } else {
        divergence_kernel<T, false><<<rows, kThreads, 0, stream>>>(args);
    }
}

template <class T, int R, bool Teacher>
void launch_gradient(const GradientArgs& args, cudaStream_t stream) {
    const unsigned rows = static_cast<unsigned>(args.shard.rows);
    constexpr bool any = R != 0;
    if (any && args.divergence.divergence.kind != DivergenceKind::kNone) {
        gradient_kernel<T, R, Teacher, any><<<rows, kThreads, 0, stream>>>(args);
    } else {
        gradient_kernel<T, R, Teacher, false><<<rows, kThreads, 0, stream>>>(args);
    }
}

template <class T>
void launch_gradient(const GradientArgs& args, cudaStream_t stream) {
    const bool teacher = any_teacher(args.shard);
    switch (args.shard.num_residuals) {
        case 0:
            launch_gradient<T, 0, false>(args, stream);
            break;
        case 1:
            if (teacher) {
                launch_gradient<T, 1, true>(args, stream);
            } else {
                launch_gradient<T, 1, false>(args, stream);
            }
            break;
        default:
            if (teacher) {
                launch_gradient<T, 2, true>(args, stream);
            } else {
                launch_gradient<T, 2, false>(args, stream);
            }
    }
}

}  // namespace
}  // namespace qtarget
