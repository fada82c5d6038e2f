// What happens per token between the statistics and the gradient, shared by the CPU and the CUDA
// kernels; double arithmetic, ranks in rank order, so that every rank ends with bitwise the same
// numbers.
//
// merge_token    the partials of all ranks -> statistics over the whole vocabulary
// weigh_token    those, and an objective's loss and masses -> its loss, and what the gradient needs
// chain_token    the latter, and the upstream gradient of the loss -> the scales of the gradient
#pragma once

#include "row_math.h"

namespace qtarget {

// Rows of the merged statistics: max, sum_exp, log_p, p, entropy, [collision], then of each
// residual max, sum_exp, lse, mean_logit, [entropy], [log_p], then [divergence, mean of its h].
constexpr int kMergedBase = 5;
constexpr int kMergedResidual = 4;

QTARGET_FN int64_t merged_residual_row(const Layout& layout, int residual) {
    return kMergedBase + layout.collision +
           (kMergedResidual + layout.residual_entropy + layout.residual_label) * residual;
}

QTARGET_FN int64_t merged_divergence_row(const Layout& layout, int num_residuals) {
    return merged_residual_row(layout, num_residuals);
}

// Where the statistics end and what an objective makes of them begins.
QTARGET_FN int64_t merged_rows(const Layout& layout, int num_residuals) {
    return merged_divergence_row(layout, num_residuals) + (layout.divergence ? 2 : 0);
}

// A residual's coefficients as the kernels have rounded them, and what turns the maximum of its u
// into that of the exact ones.
struct MergedResidual {
    double a, b, rounding;
};

struct MergeArgs {
    const void* partials;    // [ranks, rows, partial_width], contiguous
    bool wide;               // float64, otherwise float32
    const bool* supervised;  // [rows]
    int64_t ranks;
    int64_t rows;
    Layout layout;
    int num_residuals;
    MergedResidual residuals[kMaxResiduals];
    double* out;  // [merged_rows(layout, num_residuals), rows], contiguous
};

// One column of a token's partials, over the ranks.
template <class T>
struct RankColumn {
    const T* first;
    int64_t stride;
    int64_t ranks;

    QTARGET_FN_MEMBER double at(int64_t rank) const {
        return static_cast<double>(first[rank * stride]);
    }

    QTARGET_FN_MEMBER double sum() const {
        double total = at(0);
        for (int64_t rank = 1; rank < ranks; ++rank) total += at(rank);
        return total;
    }

    // NaN stays.
    QTARGET_FN_MEMBER double max() const {
        double top = at(0);
        for (int64_t rank = 1; rank < ranks; ++rank) {
            const double value = at(rank);
            if (value > top || value != value) top = value;
        }
        return top;
    }
};

// Moves a rank's sums, centred on its own maximum, to the global one.
struct RankShift {
    double offset;
    double factor;

    // The sums of a lone rank are there already.
    QTARGET_FN_MEMBER static RankShift to(double global, double local, int64_t ranks) {
        if (ranks == 1) return {0.0, 1.0};
        if (local == lowest<double>()) return {0.0, 0.0};
        const double offset = local - global;
        return {offset, exp(offset)};
    }

    // A factor of 0 belongs to a shard without a finite column or to one that underflows: its -inf
    // must not turn into NaN, while a NaN has to survive.
    QTARGET_FN_MEMBER double moved(double sum, double by) const {
        return factor == 0.0 && sum == sum ? 0.0 : sum * by;
    }
    QTARGET_FN_MEMBER double moved(double sum) const {
        return moved(sum, factor);
    }
};

template <class T>
QTARGET_FN void merge_token(const MergeArgs& args, int64_t row) {
    const Layout& layout = args.layout;
    const int64_t width = partial_width(layout, args.num_residuals), ranks = args.ranks;
    const T* const first = static_cast<const T*>(args.partials) + row * width;
    const auto column = [&](int64_t index) {
        return RankColumn<T>{first + index, args.rows * width, ranks};
    };
    const auto put = [&](int64_t index, double value) { args.out[index * args.rows + row] = value; };

    if (!args.supervised[row]) {
        const int64_t count = merged_rows(layout, args.num_residuals);
        for (int64_t index = 0; index < count; ++index) put(index, 0.0);
        put(1, 1.0);
        for (int r = 0; r < args.num_residuals; ++r)
            put(merged_residual_row(layout, r) + 1, 1.0);
        return;
    }

    const RankColumn<T> m = column(0), s = column(1), e = column(2), c = column(kBaseWidth);
    const double maximum = m.max();
    double sum = 0.0, centred = 0.0, collision = 0.0;
    for (int64_t rank = 0; rank < ranks; ++rank) {
        const RankShift shift = RankShift::to(maximum, m.at(rank), ranks);
        sum += shift.moved(s.at(rank));
        centred += shift.moved(e.at(rank) + shift.offset * s.at(rank));
        if (layout.collision)
            collision += shift.moved(c.at(rank), shift.factor * shift.factor);
    }
    const double log_sum = log(sum);
    const double label_logit = column(3).sum();
    // Subtracting the maximum first keeps the precision of the label logit at large offsets.
    const double log_p = (label_logit - maximum) - log_sum;
    put(0, maximum);
    put(1, sum);
    put(2, log_p);
    put(3, exp(log_p));
    put(4, log_sum - centred / sum);
    if (layout.collision) put(kMergedBase, collision / (sum * sum));

    for (int r = 0; r < args.num_residuals; ++r) {
        const MergedResidual& residual = args.residuals[r];
        const int64_t start = residual_column(layout, r);
        const RankColumn<T> m_u = column(start), s_u = column(start + 1), x_u = column(start + 2);
        const RankColumn<T> h_u = column(start + 3);
        const double maximum_u = m_u.max();
        double sum_u = 0.0, cross = 0.0, centred_u = 0.0;
        for (int64_t rank = 0; rank < ranks; ++rank) {
            const RankShift shift = RankShift::to(maximum_u, m_u.at(rank), ranks);
            const double s_of_rank = s_u.at(rank);
            // A shard whose logits are all -inf but which carries residual mass makes the mean
            // -inf, as it should.
            const double base = ranks == 1 || s_of_rank == 0.0 ? 0.0 : m.at(rank) - maximum;
            sum_u += shift.moved(s_of_rank);
            cross += shift.moved(x_u.at(rank) + base * s_of_rank);
            if (layout.residual_entropy)
                centred_u += shift.moved(h_u.at(rank) + shift.offset * s_of_rank);
        }
        const double log_sum_u = log(sum_u);
        int64_t index = merged_residual_row(layout, r);
        put(index++, maximum_u);
        put(index++, sum_u);
        put(index++, maximum_u * residual.rounding + log_sum_u);
        put(index++, cross / sum_u + maximum);
        if (layout.residual_entropy) put(index++, log_sum_u - centred_u / sum_u);
        if (layout.residual_label) {
            const double teacher = column(start + kResidualWidth + layout.residual_entropy).sum();
            double u = 0.0;
            // A coefficient of 0 removes its operand.
            if (residual.a != 0.0) u += residual.a * label_logit;
            if (residual.b != 0.0) u += residual.b * teacher;
            put(index, (u - maximum_u) - log_sum_u);
        }
    }
    if (!layout.divergence) return;
    // KL(p || r) of the first residual, which is its own mean of h. Others come from a second pass.
    double divergence = 0.0;
    if (layout.reverse_cross) {
        const RankColumn<T> y = column(reverse_column(layout, args.num_residuals));
        const RankColumn<T> m_u = column(residual_column(layout, 0));
        const int64_t first = merged_residual_row(layout, 0);
        const double maximum_u = args.out[first * args.rows + row];
        double reverse = 0.0;
        for (int64_t rank = 0; rank < ranks; ++rank) {
            const RankShift shift = RankShift::to(maximum, m.at(rank), ranks);
            const double s_of_rank = s.at(rank);
            // Where a shard of p's mass has no finite u, the divergence is infinite, as it should.
            const bool stays = ranks == 1 || s_of_rank == 0.0 || m_u.at(rank) == maximum_u;
            const double offset = stays ? 0.0 : (m_u.at(rank) - maximum_u) * s_of_rank;
            reverse += shift.moved(y.at(rank) + offset);
        }
        const double log_sum_u = log(args.out[(first + 1) * args.rows + row]);
        divergence = (log_sum_u - reverse / sum) - (log_sum - centred / sum);
    }
    put(merged_divergence_row(layout, args.num_residuals), divergence);
    put(merged_divergence_row(layout, args.num_residuals) + 1, divergence);
}

// A mass per token, or one for all tokens.
struct Mass {
    const double* per_token;  // null: value
    double value;

    QTARGET_FN_MEMBER double at(int64_t row) const {
        return per_token == nullptr ? value : per_token[row];
    }
};

constexpr int kMaxGuards = 8;

struct WeighArgs {
    double* merged;  // as merge_token writes it; behind: label mass, residual mass, trust
    const bool* supervised;
    int64_t rows;
    Layout layout;
    int num_residuals;
    const double* loss;  // [rows], of the objective; null: the cross-entropy of its target
    Mass label_mass;
    Mass residual_masses[kMaxResiduals];
    Mass divergence_mass;  // read where the layout has a divergence
    int num_guards;
    const double* guards[kMaxGuards];  // a NaN in one of these reaches the loss
    bool wide;       // out_loss and maxima are float64, otherwise float32
    void* out_loss;  // [rows]
    void* maxima;    // [1 + R, rows], then [offset, mean of h] of a divergence
    double* scales;  // [2 + R, rows], then [scale of exp(z - max)] of a divergence
};

template <class T>
QTARGET_FN void weigh_token(const WeighArgs& args, int64_t row) {
    const auto merged = [&](int64_t index) { return args.merged[index * args.rows + row]; };
    const bool supervised = args.supervised[row];
    const double label_mass = supervised ? args.label_mass.at(row) : 0.0;
    double residual_mass = 0.0;
    double masses[kMaxResiduals] = {};
    for (int r = 0; r < args.num_residuals; ++r) {
        masses[r] = supervised ? args.residual_masses[r].at(row) : 0.0;
        residual_mass = r == 0 ? masses[0] : residual_mass + masses[r];
    }
    // The divergence's gradient has a mean of its own: it adds nothing to what p is multiplied with.
    const double total = label_mass + residual_mass;
    const bool diverges = args.layout.divergence;
    const double divergence_mass = diverges && supervised ? args.divergence_mass.at(row) : 0.0;
    const double other_mass = residual_mass + divergence_mass;
    double* const totals =
        args.merged + merged_rows(args.layout, args.num_residuals) * args.rows + row;
    totals[0] = label_mass;
    totals[args.rows] = other_mass;
    totals[2 * args.rows] = supervised ? label_mass / (label_mass + other_mass) : 0.0;
    const int64_t divergence_row = merged_divergence_row(args.layout, args.num_residuals);

    double loss = 0.0;
    if (args.loss != nullptr) {
        loss = args.loss[row];
    } else {
        // A mass of 0 adds nothing to the loss, whatever it weighs.
        if (label_mass != 0.0) loss = -label_mass * merged(2);
        const double lse = merged(0) + log(merged(1));
        for (int r = 0; r < args.num_residuals; ++r) {
            const double cross_entropy = lse - merged(merged_residual_row(args.layout, r) + 3);
            if (masses[r] != 0.0) loss += masses[r] * cross_entropy;
        }
        if (divergence_mass != 0.0) loss += divergence_mass * merged(divergence_row);
    }
    // A NaN statistic must reach the loss even where an objective's own guards would hide it.
    const auto guard = [&](double statistic) {
        if (statistic != statistic) loss = statistic;
    };
    guard(merged(2));
    for (int r = 0; r < args.num_residuals; ++r)
        guard(merged(merged_residual_row(args.layout, r) + 3));
    if (diverges) guard(merged(divergence_row));
    for (int index = 0; index < args.num_guards; ++index) guard(args.guards[index][row]);
    static_cast<T*>(args.out_loss)[row] = static_cast<T>(supervised ? loss : 0.0);

    T* const maxima = static_cast<T*>(args.maxima) + row;
    double* const scales = args.scales + row;
    maxima[0] = static_cast<T>(merged(0));
    scales[0] = total / merged(1);
    scales[args.rows] = label_mass;
    for (int r = 0; r < args.num_residuals; ++r) {
        const int64_t index = merged_residual_row(args.layout, r);
        maxima[(1 + r) * args.rows] = static_cast<T>(merged(index));
        scales[(2 + r) * args.rows] = masses[r] / merged(index + 1);
    }
    if (!diverges) return;
    T* const of_divergence = maxima + (1 + args.num_residuals) * args.rows;
    const double sum_exp_u = merged(merged_residual_row(args.layout, 0) + 1);
    of_divergence[0] = static_cast<T>(log(merged(1)) - log(sum_exp_u));
    of_divergence[args.rows] = static_cast<T>(merged(divergence_row + 1));
    scales[(2 + args.num_residuals) * args.rows] = divergence_mass / merged(1);
}

struct ChainArgs {
    const double* scales;  // [count, stride], of which the first rows columns
    int64_t count;
    int64_t stride;
    int64_t rows;
    const void* upstream;  // [rows]
    int64_t upstream_stride;
    bool wide;  // upstream and out are float64, otherwise float32
    void* out;  // [count, rows], contiguous
};

template <class T>
QTARGET_FN void chain_token(const ChainArgs& args, int64_t row) {
    const double upstream = static_cast<double>(
        static_cast<const T*>(args.upstream)[row * args.upstream_stride]);
    T* const out = static_cast<T*>(args.out) + row;
    for (int64_t index = 0; index < args.count; ++index) {
        // A token masked out downstream has upstream exactly 0: its NaN must not leak.
        const double scale = args.scales[index * args.stride + row] * upstream;
        out[index * args.rows] = static_cast<T>(upstream == 0.0 ? 0.0 : scale);
    }
}

}  // namespace qtarget
