// A step of greedy.h. Where the packs are float32, every candidate gets a float32 score and a bound on its error that
// holds for any rounding (below); the candidates that the bounds leave in question are scored again in float64. The
// choice is therefore that of float64, ties included.
#include "greedy.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Views into job.scratch.
struct Work {
    double* factor;   // (groups, d, d) A, then L
    double* basis;    // (groups, d, d) L^-1
    double* centre;   // (groups, d)
    double* common;   // (groups,) log det A - d log s
    double* spread;   // (groups,) at least the spectral norm of |L^-1|
    double* length;   // (groups,) norm of `centre`
    double* column;   // (groups, d)
    double* low;      // (subsets,) bounds of the log-determinant, by id
    double* high;     // (subsets,)
    double* sorted;   // (subsets,)
    double* scores;   // (packs, lanes)
    double* traces;   // (packs, lanes)
    double* some;     // one float64 pack
    double* merged;   // (largest, d)
    int64_t* starts;  // (packs,) of the packs to score
    int64_t* sizes;
    int64_t* pack_group;
    int64_t* wanted;  // (subsets,)
    double* threads;  // a scorer's scratch per thread
    float* basis32;   // (groups, d, d)
    float* centre32;  // (groups, d)
};

int64_t max_packs(int64_t subsets, int64_t groups) {
    return subsets / kLanes<double> + groups + 1;
}

// Either lays the views over `base`, or counts doubles.
int64_t lay_out(double* base, int64_t d, int64_t subsets, int64_t groups, int64_t largest, int threads, Work* w) {
    int64_t used = 0;
    const auto take = [&](int64_t doubles) {
        double* at = base == nullptr ? nullptr : base + used;
        used += (doubles + 7) / 8 * 8;
        return at;
    };
    const int64_t packs = max_packs(subsets, groups);
    w->factor = take(groups * d * d);
    w->basis = take(groups * d * d);
    w->centre = take(groups * d);
    w->common = take(groups);
    w->spread = take(groups);
    w->length = take(groups);
    w->column = take(groups * d);
    w->low = take(subsets);
    w->high = take(subsets);
    w->sorted = take(subsets);
    w->scores = take(packs * kLanes<float>);
    w->traces = take(packs * kLanes<float>);
    w->some = take(d * largest * kLanes<double>);
    w->merged = take(largest * d);
    w->starts = reinterpret_cast<int64_t*>(take(packs));
    w->sizes = reinterpret_cast<int64_t*>(take(packs));
    w->pack_group = reinterpret_cast<int64_t*>(take(packs));
    w->wanted = reinterpret_cast<int64_t*>(take(subsets));
    w->threads = take(threads * subset_scores_scratch(d, largest));
    w->basis32 = reinterpret_cast<float*>(take((groups * d * d + 1) / 2));
    w->centre32 = reinterpret_cast<float*>(take((groups * d + 1) / 2));
    return used;
}

int64_t largest_size(const Greedy& job) {
    return *std::max_element(job.group_size, job.group_size + job.groups);
}

template <class Real>
void pack_one(const Greedy& job, int64_t id, Real* pack, int64_t lane) {
    const double* x = job.rows + job.offsets[id] * job.d;
    const int64_t size = job.offsets[id + 1] - job.offsets[id];
    for (int64_t i = 0; i < size; ++i)
        for (int64_t k = 0; k < job.d; ++k)
            pack[(k * size + i) * kLanes<Real> + lane] = static_cast<Real>(x[i * job.d + k]);
}

template <class Real>
Real* pack_of(const Greedy& job, int64_t group, int64_t slot) {
    return static_cast<Real*>(job.packs) + job.group_packed[group] +
           slot / kLanes<Real> * job.d * job.group_size[group] * kLanes<Real>;
}

template <class Real>
void pack_all(const Greedy& job) {
    for (int64_t g = 0; g < job.groups; ++g) {
        const int64_t* ids = job.ids + job.group_begin[g];
        const int64_t count = job.left[g];
        // Lanes past the last subset repeat it: their scores are computed and never read.
        for (int64_t slot = 0; slot < (count + kLanes<Real> - 1) / kLanes<Real> * kLanes<Real>; ++slot)
            pack_one(job, ids[slot < count ? slot : count - 1], pack_of<Real>(job, g, slot), slot % kLanes<Real>);
    }
}

void factor_group(const Greedy& job, const Work& w, int64_t g) {
    const int64_t d = job.d;
    double *a = w.factor + g * d * d, *b = w.basis + g * d * d, *centre = w.centre + g * d;
    const double ridge = (job.count + job.group_size[g]) / job.alpha;
    std::memcpy(a, job.scatter, d * d * sizeof(double));
    for (int64_t i = 0; i < d; ++i) a[i * d + i] += ridge;
    w.common[g] = kernels().factor_f64(a, d, b, w.column + g * d) - d * std::log(ridge);
    kernels().lower_times_f64(b, job.mean, d, centre);
    if (!job.single) return;
    // Of |B|, the spectral norm squared is at most the largest row sum times the largest column sum.
    double* columns = w.column + g * d;
    std::fill(columns, columns + d, 0.0);
    double row_most = 0.0, length = 0.0;
    for (int64_t i = 0; i < d; ++i) {
        double row = 0.0;
        for (int64_t k = 0; k <= i; ++k) {
            const double x = std::fabs(b[i * d + k]);
            row += x;
            columns[k] += x;
        }
        row_most = std::max(row_most, row);
        length += centre[i] * centre[i];
    }
    w.spread[g] = std::sqrt(row_most * *std::max_element(columns, columns + d));
    w.length[g] = std::sqrt(length);
    std::copy(b, b + d * d, w.basis32 + g * d * d);
    std::copy(centre, centre + d, w.centre32 + g * d);
}

void factor_groups(const Greedy& job, const Work& w, int threads) {
    parallel_rows(job.groups, 1, threads, [&](int64_t g, int64_t, int) {
        if (job.left[g] > 0) factor_group(job, w, g);
    });
}

// Bound on |float32 J - J| for one subset. u = 2^-24, gamma(k) = k u / (1 - k u).
//   W = B X is off by gamma(d + 2) |B| |X| (two roundings of B and X, d of the sum), centring by gamma(size + 6) of
//   what it subtracts. J moves by at most the nuclear norm of the change of Y', because its gradient 2 Y'(I + Y'^T
//   Y')^-1 has a spectral norm of at most 1. The Gram matrix M = I + Y'^T Y' is then off by E with |E_ij| <= eps
//   sqrt(M_ii M_jj), sums and LDL^T together, and log det M by at most |E|_* <= eps sqrt(size) tr M, because M >= I.
// The factor 1.1 covers the terms of second order, which the test for 0.05 keeps small.
double float_error(double d, double size, double spread, double norm, double centre, double trace) {
    constexpr double u = 0x1p-24;
    const double sum = (d + 2) * u / (1 - (d + 2) * u), mean = (size + 6) * u / (1 - (size + 6) * u);
    const double columns = spread * norm * 2 * (sum + mean) + mean * std::sqrt(size) * centre;
    const double gram = (d * u / (1 - d * u) + (3 * size + 6) * u) * std::sqrt(size) * (size + trace);
    return gram < 0.05 ? 1.1 * (std::sqrt(std::min(size, d)) * columns + gram) : kInfinity;
}

// Scores every free subset, into w.low and w.high by id: equal in float64, apart by the error bound in float32.
template <class Real>
void score_all(Greedy& job, const Work& w, int threads) {
    constexpr int64_t kLane = kLanes<Real>;
    int64_t packs = 0;
    for (int64_t g = 0; g < job.groups; ++g)
        for (int64_t slot = 0; slot < job.left[g]; slot += kLane) {
            w.starts[packs] = pack_of<Real>(job, g, slot) - static_cast<Real*>(job.packs);
            w.sizes[packs] = job.group_size[g];
            w.pack_group[packs++] = g;
        }
    const Real *basis = nullptr, *centre = nullptr;
    if constexpr (sizeof(Real) == 4) {
        basis = w.basis32, centre = w.centre32;
    } else {
        basis = w.basis, centre = w.centre;
    }
    subset_scores<Real>({static_cast<const Real*>(job.packs), w.starts, w.sizes, w.pack_group, packs, job.d, basis,
                         centre, job.anchor, w.scores, w.traces},
                        reinterpret_cast<Real*>(w.threads), threads);
    int64_t first = 0;
    for (int64_t g = 0; g < job.groups; ++g) {
        const double size = job.group_size[g], d = job.d;
        for (int64_t slot = 0; slot < job.left[g]; ++slot) {
            const int64_t id = job.ids[job.group_begin[g] + slot], at = first * kLane + slot;
            const double value = w.common[g] + w.scores[at];
            double error = 0.0;
            if (sizeof(Real) == 4) {
                error = float_error(d, size, w.spread[g], job.norms[id], w.length[g], w.traces[at]);
                // An overflow of float32 says nothing.
                if (!std::isfinite(value) || !std::isfinite(error)) error = kInfinity;
            }
            w.low[id] = error < kInfinity ? value - error : -kInfinity;
            w.high[id] = error < kInfinity ? value + error : kInfinity;
        }
        first += (job.left[g] + kLane - 1) / kLane;
        job.scored += job.left[g];
    }
}

// Scores the subsets wanted[0:count) in float64, a pack of one group at a time.
void decide(Greedy& job, const Work& w, int64_t count) {
    constexpr int64_t kLane = kLanes<double>;
    const int64_t d = job.d;
    std::sort(w.wanted, w.wanted + count, [&](int64_t a, int64_t b) {
        return job.group_of[a] != job.group_of[b] ? job.group_of[a] < job.group_of[b] : a < b;
    });
    job.decided += count;
    for (int64_t begin = 0, end; begin < count; begin = end) {
        const int64_t g = job.group_of[w.wanted[begin]];
        for (end = begin; end < count && end < begin + kLane && job.group_of[w.wanted[end]] == g; ++end)
            pack_one(job, w.wanted[end], w.some, end - begin);
        for (int64_t lane = end - begin; lane < kLane; ++lane) pack_one(job, w.wanted[begin], w.some, lane);
        const int64_t start = 0;
        double scores[kLane];
        kernels().subset_scores_f64(
            {w.some, &start, &job.group_size[g], &g, 1, d, w.basis, w.centre, job.anchor, scores, nullptr}, 0, 1,
            w.threads);
        for (int64_t i = begin; i < end; ++i)
            w.low[w.wanted[i]] = w.high[w.wanted[i]] = w.common[g] + scores[i - begin];
    }
}

double loss_least(const Greedy& job, double low, double high) {
    if (job.mode == Mode::max) return -high;
    if (job.mode == Mode::min) return low;
    return std::max(0.0, std::max(low - job.high, job.low - high));
}

double loss_most(const Greedy& job, double low, double high) {
    if (job.mode == Mode::max) return -low;
    if (job.mode == Mode::min) return high;
    return std::max(0.0, std::max(high - job.high, job.low - low));
}

// The q-quantile of `values` over the free subsets: rank floor(q (count - 1) + 1/2) from the smallest.
double quantile(const Greedy& job, const double* values, double* sorted) {
    int64_t count = 0;
    for (int64_t g = 0; g < job.groups; ++g)
        for (int64_t slot = 0; slot < job.left[g]; ++slot) sorted[count++] = values[job.ids[job.group_begin[g] + slot]];
    double* at = sorted + static_cast<int64_t>(std::floor(job.q * (count - 1) + 0.5));
    std::nth_element(sorted, at, sorted + count);
    return *at;
}

template <class Visit>
void for_free(const Greedy& job, Visit visit) {
    for (int64_t g = 0; g < job.groups; ++g)
        for (int64_t slot = 0; slot < job.left[g]; ++slot) visit(job.ids[job.group_begin[g] + slot]);
}

// The subset that the rule takes; ties go to the lowest id. Afterwards low = high for every subset that could be it.
int64_t choose(Greedy& job, const Work& w) {
    double from = 0.0, to = kInfinity;  // of the loss, or of the quantile's value
    const bool ranked = job.mode == Mode::quantile;
    if (ranked) {
        from = quantile(job, w.low, w.sorted);
        to = quantile(job, w.high, w.sorted);
    } else {
        for_free(job, [&](int64_t id) { to = std::min(to, loss_most(job, w.low[id], w.high[id])); });
    }
    int64_t count = 0;
    for_free(job, [&](int64_t id) {
        if (w.low[id] == w.high[id]) return;
        const bool open = ranked ? !(w.high[id] < from - job.tie) && !(w.low[id] > to + job.tie)
                                 : !(loss_least(job, w.low[id], w.high[id]) > to + job.tie);
        if (open) w.wanted[count++] = id;
    });
    if (count > 0) decide(job, w, count);
    double best = kInfinity;
    if (ranked) {
        best = quantile(job, w.low, w.sorted);
    } else {
        for_free(job, [&](int64_t id) {
            if (w.low[id] == w.high[id]) best = std::min(best, loss_least(job, w.low[id], w.low[id]));
        });
    }
    int64_t found = -1;
    for_free(job, [&](int64_t id) {
        if (w.low[id] != w.high[id] || (found >= 0 && id > found)) return;
        const double distance = ranked ? std::fabs(w.low[id] - best) : loss_least(job, w.low[id], w.low[id]) - best;
        if (distance <= job.tie) found = id;
    });
    return found;
}

template <class Real>
void remove_from_packs(Greedy& job, int64_t id) {
    const int64_t g = job.group_of[id], last = --job.left[g];
    int64_t* ids = job.ids + job.group_begin[g];
    const int64_t slot = std::find(ids, ids + last, id) - ids;
    ids[slot] = ids[last];
    ids[last] = id;
    if (slot == last) return;
    pack_one(job, ids[slot], pack_of<Real>(job, g, slot), slot % kLanes<Real>);
}

void commit(Greedy& job, const Work& w, int64_t id) {
    const int64_t d = job.d, size = job.offsets[id + 1] - job.offsets[id];
    const double* x = job.rows + job.offsets[id] * d;
    const double h = (1.0 - std::sqrt(1.0 - size / (job.anchor + size))) / size, keep = 1.0 - h * size;
    const double move = std::isinf(job.anchor) ? 0.0 : size / (job.anchor + size);
    for (int64_t k = 0; k < d; ++k) {
        double sum = 0.0;
        for (int64_t i = 0; i < size; ++i) sum += x[i * d + k];
        const double v = keep * job.mean[k] + h * sum;
        for (int64_t i = 0; i < size; ++i) w.merged[i * d + k] = x[i * d + k] - v;
        job.mean[k] += (sum / size - job.mean[k]) * move;
    }
    kernels().rank_update_f64(w.merged, size, d, job.scatter);
    job.anchor += size;
    job.count += size;
    job.single ? remove_from_packs<float>(job, id) : remove_from_packs<double>(job, id);
}

}  // namespace

int64_t greedy_scratch(int64_t d, int64_t subsets, int64_t groups, int64_t largest, int threads) noexcept {
    Work w;
    return lay_out(nullptr, d, subsets, groups, largest, threads, &w);
}

int64_t greedy_packed(int64_t d, int64_t count, int64_t size, bool single) noexcept {
    const int64_t lanes = single ? kLanes<float> : kLanes<double>;
    return (count + lanes - 1) / lanes * lanes * size * d;
}

void greedy_pack(const Greedy& job) noexcept {
    job.single ? pack_all<float>(job) : pack_all<double>(job);
}

void greedy(Greedy& job, int threads) noexcept {
    Work w;
    lay_out(job.scratch, job.d, job.subsets, job.groups, largest_size(job), threads, &w);
    for (job.done = 0; job.done < job.steps;) {
        factor_groups(job, w, threads);
        job.single ? score_all<float>(job, w, threads) : score_all<double>(job, w, threads);
        const int64_t id = choose(job, w);
        if (id < 0) return;  // every log-determinant is NaN
        const double value = w.low[id];
        commit(job, w, id);
        job.picked[job.done] = id;
        job.values[job.done++] = value;
        if (job.stop >= 0.0 && value >= job.low - job.stop && value <= job.high + job.stop) return;
    }
}

void greedy_runs(Greedy* jobs, int64_t count, int threads) noexcept {
    if (count == 1) return greedy(jobs[0], threads);
    // Every run has scratch for one thread: inside a parallel region, its own loops run serially.
    parallel_rows(count, 1, threads, [&](int64_t i, int64_t, int) { greedy(jobs[i], 1); });
}

}  // namespace ltk
