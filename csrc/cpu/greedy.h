// Greedy selection of subsets by Feature Diversity Gain, all steps in one call: factor, score, choose, commit.
#pragma once
#include <cstdint>

namespace ltk {

enum class Mode : int { max = 0, min = 1, quantile = 2, target = 3 };

// One run. Python owns every buffer; what is marked in/out is the state, so that a run may be continued by another
// call.
struct Greedy {
    int64_t d, subsets, groups;
    const double* rows;           // (P, d) row-major, relative to the origin of the state
    const int64_t* offsets;       // (subsets + 1,)
    const int64_t* group_of;      // (subsets,) groups are sizes: all subsets of a group have one size
    const int64_t* group_size;    // (groups,)
    const int64_t* group_begin;   // (groups + 1,) slots of each group
    const int64_t* group_packed;  // (groups,) where each group's packs begin in `packs`, in elements
    const double* norms;          // (subsets,) Frobenius norm of each subset's rows
    int64_t* ids;                 // (subsets,) in/out: the subset in each slot; the free ones of a group come first
    int64_t* left;                // (groups,) in/out: free subsets of each group
    void* packs;           // in/out: the pool as greedy_pack wrote it; a committed subset makes room for the last
    bool single;           // packs are float32: scores screen, float64 decides
    double* scatter;       // (d, d) in/out
    double* mean;          // (d,) in/out
    double count, anchor;  // in/out
    double alpha;
    Mode mode;
    double q, low, high;  // of quantile; of target, as log-determinants
    double tie;           // log-determinants closer than this are equal
    double stop;          // target: stop within this of [low, high]; negative never stops
    int64_t steps;        // wanted
    int64_t* picked;      // (steps,) out
    double* values;       // (steps,) out: the log-determinant after each step
    int64_t done;         // out: steps made
    int64_t scored;       // in/out: scores computed
    int64_t decided;      // in/out: of these, again in float64
    double* scratch;      // greedy_scratch(...)
};

// Doubles of scratch for one run on `threads` threads.
int64_t greedy_scratch(int64_t d, int64_t subsets, int64_t groups, int64_t largest, int threads) noexcept;

// Elements of the packs of `count` subsets of `size` rows.
int64_t greedy_packed(int64_t d, int64_t count, int64_t size, bool single) noexcept;

// Fills job.packs from job.rows, in the order of job.ids.
void greedy_pack(const Greedy& job) noexcept;

void greedy(Greedy& job, int threads) noexcept;

// Independent runs, side by side where there are several.
void greedy_runs(Greedy* jobs, int64_t count, int threads) noexcept;

// What a step needs of one ISA: L with L L^T = matrix (lower triangles, row-major, in place), and L^-1 (zeros above the
// diagonal). Returns log det, NaN where the matrix is not positive definite.
using Factor = double (*)(double* matrix, int64_t d, double* inverse, double* scratch) noexcept;
// t (d, d) += y^T y for y (rows, d).
using RankUpdate = void (*)(const double* y, int64_t rows, int64_t d, double* t) noexcept;
// out (d,) = b x for a lower triangular b (d, d).
using LowerTimes = void (*)(const double* b, const double* x, int64_t d, double* out) noexcept;

}  // namespace ltk
