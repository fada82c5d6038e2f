// The Python module qtarget_megatron._C: addresses and sizes in, nothing checked here that needs a
// tensor. qtarget_megatron/kernels/native.py is its only caller and checks shapes, dtypes, devices
// and strides.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core.h"
#include "cpu/dispatch.h"
#include "cpu/tokens.h"
#if defined(QTARGET_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace py = pybind11;

namespace {

using Address = uintptr_t;
using MatrixTuple = std::tuple<Address, int, int64_t>;      // data, dtype, row stride in elements
// In the order of qtarget::Layout; a divergence's kind, share and two weights.
using LayoutTuple = std::tuple<bool, int64_t, bool, bool, bool, bool>;
using DivergenceTuple = std::tuple<int, double, double, double>;

template <class T>
T* pointer(Address address) {
    return reinterpret_cast<T*>(address);
}

qtarget::MatrixView matrix(const MatrixTuple& tuple) {
    const int dtype = std::get<1>(tuple);
    if (dtype < 0 || dtype > 2)
        throw std::invalid_argument("dtype must be 0, 1 or 2, got " + std::to_string(dtype));
    return {pointer<void>(std::get<0>(tuple)), static_cast<qtarget::Dtype>(dtype),
            std::get<2>(tuple)};
}

qtarget::Layout layout_of(const LayoutTuple& layout) {
    return {std::get<0>(layout), std::get<1>(layout), std::get<2>(layout),
            std::get<3>(layout), std::get<4>(layout), std::get<5>(layout)};
}

qtarget::Divergence divergence_of(const DivergenceTuple& divergence) {
    const int kind = std::get<0>(divergence);
    if (kind < 0 || kind > 3)
        throw std::invalid_argument("a divergence is 0 to 3, got " + std::to_string(kind));
    return {static_cast<qtarget::DivergenceKind>(kind),
            static_cast<float>(std::get<1>(divergence)),
            static_cast<float>(1.0 - std::get<1>(divergence)),
            static_cast<float>(std::log(1.0 - std::get<1>(divergence))),
            static_cast<float>(std::get<2>(divergence)),
            static_cast<float>(std::get<3>(divergence))};
}

void check_residuals(size_t count) {
    if (count > static_cast<size_t>(qtarget::kMaxResiduals)) {
        throw std::invalid_argument("at most 2 residuals, got " + std::to_string(count));
    }
}

qtarget::ShardArgs shard_args(const MatrixTuple& logits, const MatrixTuple& teacher, Address labels,
                              int64_t rows, int64_t valid_columns, int64_t vocab_start,
                              int64_t ignore_index,
                              const std::vector<std::pair<double, double>>& residuals) {
    check_residuals(residuals.size());
    qtarget::ShardArgs shard{};
    shard.logits = matrix(logits);
    shard.teacher = matrix(teacher);
    shard.labels = pointer<const int64_t>(labels);
    shard.rows = rows;
    shard.valid_columns = valid_columns;
    shard.vocab_start = vocab_start;
    shard.ignore_index = ignore_index;
    for (const auto& [a, b] : residuals) {
        shard.residuals[shard.num_residuals++] = {static_cast<float>(a), static_cast<float>(b)};
    }
    return shard;
}

qtarget::StatisticsArgs statistics_args(const MatrixTuple& logits, const MatrixTuple& teacher,
                                        Address labels, int64_t rows, int64_t valid_columns,
                                        int64_t vocab_start, int64_t ignore_index,
                                        const std::vector<std::pair<double, double>>& residuals,
                                        const LayoutTuple& layout, int64_t width, Address out) {
    const qtarget::StatisticsArgs args = {
        shard_args(logits, teacher, labels, rows, valid_columns, vocab_start, ignore_index,
                   residuals),
        layout_of(layout), pointer<float>(out)};
    const int64_t expected = qtarget::partial_width(args.layout, args.shard.num_residuals);
    if (args.layout.top_k < 0 || width != expected) {
        throw std::invalid_argument("this layout has " + std::to_string(expected) +
                                    " columns, got " + std::to_string(width));
    }
    return args;
}

qtarget::GradientArgs gradient_args(const MatrixTuple& logits, const MatrixTuple& teacher,
                                    Address labels, int64_t rows, int64_t valid_columns,
                                    int64_t vocab_start, int64_t ignore_index,
                                    const std::vector<std::pair<double, double>>& residuals,
                                    int64_t columns, Address maxima, Address scales,
                                    const DivergenceTuple& divergence, const MatrixTuple& out) {
    const float* const max = pointer<const float>(maxima);
    const float* const scale = pointer<const float>(scales);
    const int64_t count = static_cast<int64_t>(residuals.size());
    return {shard_args(logits, teacher, labels, rows, valid_columns, vocab_start, ignore_index,
                       residuals),
            columns,
            max,
            scale,
            scale + rows,
            max + rows,
            scale + 2 * rows,
            {divergence_of(divergence), max + (1 + count) * rows, max + (2 + count) * rows,
             scale + (2 + count) * rows},
            matrix(out)};
}

qtarget::DivergenceArgs divergence_args(const MatrixTuple& logits, const MatrixTuple& teacher,
                                        Address labels, int64_t rows, int64_t valid_columns,
                                        int64_t vocab_start, int64_t ignore_index,
                                        const std::vector<std::pair<double, double>>& residuals,
                                        Address maxima, Address scales,
                                        const DivergenceTuple& divergence, Address out) {
    if (residuals.empty()) throw std::invalid_argument("a divergence is from the first residual");
    const float* const max = pointer<const float>(maxima);
    const float* const scale = pointer<const float>(scales);
    return {shard_args(logits, teacher, labels, rows, valid_columns, vocab_start, ignore_index,
                       residuals),
            max,
            scale,
            max + rows,
            scale + rows,
            {divergence_of(divergence), max + 2 * rows, nullptr, nullptr},
            pointer<float>(out)};
}

qtarget::MergeArgs merge_args(Address partials, Address supervised, Address out, bool wide,
                              int64_t ranks, int64_t rows, const LayoutTuple& layout,
                              const std::vector<std::tuple<double, double, double>>& residuals) {
    check_residuals(residuals.size());
    qtarget::MergeArgs args{};
    args.partials = pointer<const void>(partials);
    args.wide = wide;
    args.supervised = pointer<const bool>(supervised);
    args.ranks = ranks;
    args.rows = rows;
    args.layout = layout_of(layout);
    for (const auto& [a, b, rounding] : residuals)
        args.residuals[args.num_residuals++] = {a, b, rounding};
    args.out = pointer<double>(out);
    return args;
}

// Each mass is an address (0: none) and a value.
qtarget::WeighArgs weigh_args(Address merged, Address supervised, Address loss, Address out_loss,
                              Address maxima, Address scales, bool wide, int64_t rows,
                              const LayoutTuple& layout,
                              const std::vector<std::pair<Address, double>>& masses,
                              const std::vector<Address>& guards) {
    const size_t of_divergence = layout_of(layout).divergence ? 1 : 0;
    if (masses.size() < 1 + of_divergence)
        throw std::invalid_argument("masses must begin with the label's");
    const size_t num_residuals = masses.size() - 1 - of_divergence;
    check_residuals(num_residuals);
    if (guards.size() > static_cast<size_t>(qtarget::kMaxGuards)) {
        throw std::invalid_argument("at most " + std::to_string(qtarget::kMaxGuards) +
                                    " guards, got " + std::to_string(guards.size()));
    }
    qtarget::WeighArgs args{};
    args.merged = pointer<double>(merged);
    args.supervised = pointer<const bool>(supervised);
    args.rows = rows;
    args.layout = layout_of(layout);
    args.num_residuals = static_cast<int>(num_residuals);
    args.loss = pointer<const double>(loss);
    const auto mass = [&](size_t index) {
        return qtarget::Mass{pointer<const double>(masses[index].first), masses[index].second};
    };
    args.label_mass = mass(0);
    for (int r = 0; r < args.num_residuals; ++r) args.residual_masses[r] = mass(1 + r);
    if (of_divergence == 1) args.divergence_mass = mass(masses.size() - 1);
    for (const Address guard : guards)
        args.guards[args.num_guards++] = pointer<const double>(guard);
    args.wide = wide;
    args.out_loss = pointer<void>(out_loss);
    args.maxima = pointer<void>(maxima);
    args.scales = pointer<double>(scales);
    return args;
}

qtarget::ChainArgs chain_args(Address scales, Address upstream, Address out, bool wide,
                              int64_t count, int64_t stride, int64_t rows,
                              int64_t upstream_stride) {
    return {pointer<const double>(scales), count, stride, rows,
            pointer<const void>(upstream), upstream_stride, wide, pointer<void>(out)};
}

py::dict build_info() {
    py::dict info;
    info["cpu"] = qtarget::compiled_isas();
    info["compiler"] = __VERSION__;
#if defined(QTARGET_WITH_CUDA)
    info["cuda"] = true;
    info["cuda_archs"] = QTARGET_CUDA_ARCHS;
    info["nvcc"] = QTARGET_NVCC_VERSION;
#else
    info["cuda"] = false;
#endif
    return info;
}

// A kernel as a function of its arguments, in the order of make's, and of where it runs. They have no
// names: matching names takes longer than the smallest of the kernels.
template <class Args, class... In, class... Where>
void define(py::module_& module, const char* name, Args (*make)(In...),
            void (*run)(const Args&, Where...)) {
    module.def(
        name, [=](In... in, Where... where) { run(make(in...), where...); },
        py::call_guard<py::gil_scoped_release>());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
    using namespace pybind11::literals;
    module.doc() = "Native kernels of qtarget_megatron; use qtarget_megatron.kernels.native.";
    module.def("build_info", &build_info,
               "What this binary was built with: cpu, compiler, cuda, cuda_archs, nvcc.");
    module.def("cpu_isa", &qtarget::cpu_isa,
               "Instruction set in use on the CPU: 'scalar', 'avx2' or 'avx512'.");
    module.def("set_cpu_isa", &qtarget::set_cpu_isa, "name"_a,
               "Force 'scalar', 'avx2' or 'avx512'; 'auto' takes it back.");

    define(module, "cpu_partial_statistics", statistics_args, qtarget::cpu_partial_statistics);
    define(module, "cpu_divergence_sums", divergence_args, qtarget::cpu_divergence_sums);
    define(module, "cpu_logit_gradient", gradient_args, qtarget::cpu_logit_gradient);
    define(module, "cpu_merge", merge_args, qtarget::cpu_merge);
    define(module, "cpu_weigh", weigh_args, qtarget::cpu_weigh);
    define(module, "cpu_chain", chain_args, qtarget::cpu_chain);
    module.def("cpu_supervised", [](Address labels, int64_t count, int64_t vocab_size,
                                    int64_t ignore_index, Address out) {
        return qtarget::cpu_supervised(pointer<const int64_t>(labels), count, vocab_size,
                                       ignore_index, pointer<bool>(out));
    });
#if defined(QTARGET_WITH_CUDA)
    define(module, "cuda_partial_statistics", statistics_args, qtarget::cuda_partial_statistics);
    define(module, "cuda_divergence_sums", divergence_args, qtarget::cuda_divergence_sums);
    define(module, "cuda_logit_gradient", gradient_args, qtarget::cuda_logit_gradient);
    define(module, "cuda_merge", merge_args, qtarget::cuda_merge);
    define(module, "cuda_weigh", weigh_args, qtarget::cuda_weigh);
    define(module, "cuda_chain", chain_args, qtarget::cuda_chain);
#endif
}
