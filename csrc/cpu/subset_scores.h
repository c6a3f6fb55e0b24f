// Scores of candidate subsets: J = log det(I + Y'^T A^-1 Y') for each, the step of greedy selection by Feature
// Diversity Gain.
#pragma once
#include <cstdint>

#include "logdet.h"

namespace ltk {

// Eight subsets of one size travel together, one per lane of a pack (kPackLanes in logdet.h): nothing is summed across
// lanes, and duplicates give the same bits.
struct SubsetScores {
    const double*
        pool;  // element (feature k, sample i, lane) of pack p: pool[pack_start[p] + (k * size + i) * 8 + lane]
    const int64_t* pack_start;  // (packs,)
    const int64_t* pack_size;   // (packs,) samples per subset
    const int64_t* pack_scale;  // (packs,) row of `scales`
    int64_t packs;
    int64_t d;
    const double* basis;   // (d, d) row-major B with A^-1 = B^T diag(scale^2) B; nullptr: the pool has been multiplied
                           // by it already
    bool lower;            // B is lower triangular
    const double* scales;  // (sizes, d), or nullptr for ones
    const double* centre;  // (d,) B times the current mean
    double anchor;   // samples that the current mean stands for: Y' = (X - mean 1^T)(I - h 11^T), see subset_scores.inl
    double* out;     // (packs, 8) J in nats
    double* within;  // (packs, 8) log det(I + Wc^T A^-1 Wc), Wc centred by the subset's own mean; or nullptr
};

// Doubles of scratch that one thread needs for subsets of at most `size` samples.
constexpr int64_t subset_scores_scratch(int64_t d, int64_t size) {
    return (d * size + size * size) * kPackLanes;
}

// Packs [begin, end) with one thread's scratch.
using SubsetScoresPacks = void (*)(const SubsetScores& job, int64_t begin, int64_t end, double* scratch) noexcept;

// All packs, over at most `threads` threads; `scratch` holds threads * subset_scores_scratch(d, largest size) doubles.
void subset_scores(const SubsetScores& job, double* scratch, int threads) noexcept;

}  // namespace ltk
