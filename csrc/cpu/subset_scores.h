// Scores of candidate subsets: J = log det(I + Y'^T A^-1 Y') for each, the step of greedy selection by Feature
// Diversity Gain.
#pragma once
#include <cstdint>

#include "logdet.h"

namespace ltk {

// Subsets of one size travel together, one per lane of a pack (logdet.h): nothing is summed across lanes, and
// duplicates give the same bits.
template <class Real>
struct SubsetScores {
    // Element (feature k, sample i, lane) of pack p: pool[pack_start[p] + (k * size + i) * lanes + lane].
    const Real* pool;
    const int64_t* pack_start;  // (packs,)
    const int64_t* pack_size;   // (packs,) samples per subset
    const int64_t* pack_group;  // (packs,) which A
    int64_t packs;
    int64_t d;
    const Real* basis;   // (groups, d, d) row-major lower triangular B with A^-1 = B^T B
    const Real* centre;  // (groups, d) B times the current mean
    double anchor;   // samples that the current mean stands for: Y' = (X - mean 1^T)(I - h 11^T), see subset_scores.inl
    double* out;     // (packs, lanes) J in nats
    double* traces;  // (packs, lanes) tr(Y'^T A^-1 Y'); or nullptr
};

// Elements of scratch that one thread needs for subsets of at most `size` samples; enough for either type.
constexpr int64_t subset_scores_scratch(int64_t d, int64_t size) {
    return (d * size + size * size) * kLanes<float>;
}

// Packs [begin, end) with one thread's scratch.
template <class Real>
using SubsetScoresPacks = void (*)(const SubsetScores<Real>& job, int64_t begin, int64_t end, Real* scratch) noexcept;

// All packs, over at most `threads` threads; `scratch` holds threads * subset_scores_scratch(d, largest size) elements.
template <class Real>
void subset_scores(const SubsetScores<Real>& job, Real* scratch, int threads) noexcept;

}  // namespace ltk
