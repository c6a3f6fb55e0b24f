// Gradients of adjusted_ce with respect to its per-class tables. The rows form them beside the logits' gradient, from
// the same exponentials in the same registers: a sum over the finished gradient would read it again from memory, and of
// 16-bit logits it would add rounded numbers. With h_ij the gradient of row i in beta_j z_ij + delta_j - m_j [j = y]:
//   d delta_j = sum_i h_ij     d beta_j = sum_i h_ij z_ij     d m_j = - sum over rows with label j of h_ij
//   d sigma_j = sum over rows with label j of sum_k (h_ik / sigma_j) u_ik     d alpha_j = the same of phi(l_i)
// The sum over k is taken of u_ik - u_iy without k = y: all h of a row add up to 0.
#pragma once
#include <cstdint>

#include "adjusted_ce.h"

namespace ltk {

constexpr int kTables = 5;    // shift, scale, margin, row_scale, weight
constexpr int kRowTerms = 3;  // of one label of one row: its shares of margin, row_scale, weight

// Column sums are kept in reals over a slice of rows and added in double over the slices; what a label chooses is kept
// a row and added in double in row order. Slices depend on the shape alone, and so do the bits.
struct VectorGradients {
    void* out[kTables];  // (classes,) real each; null where not wanted
    int64_t slice;       // rows
    int64_t stride;      // reals from one column sum to the next
    double* labels;      // (classes,)
    void* columns;       // (slices, wanted ones of shift and scale, stride) real
    void* terms;         // (rows, 1 or 2 labels, kRowTerms) real; not set for ignored rows
};

// Doubles of scratch for one call; `columns` of shift and scale are wanted, and a row has 1 or 2 `labels`.
int64_t vector_gradients_scratch(int64_t rows, int64_t classes, int columns, int labels, bool wide) noexcept;

// `job` with its shape set; `scratch` at a multiple of 64 bytes.
VectorGradients vector_gradients(const AdjustedCe& job, void* const* out, double* scratch, bool wide) noexcept;

// Column sums in reals over slices of rows; they are added in double over the slices.
struct ColumnSums {
    const void* columns;  // (slices, count, stride) real
    int64_t slices;
    int64_t stride;
    int64_t classes;
    int count;
};
int64_t slice_rows(int64_t rows, int64_t classes) noexcept;
int64_t slices_of(int64_t rows, int64_t classes) noexcept;

// `out`: `count` times (classes,) real.
void add_columns(const ColumnSums& sums, void* const* out, bool wide, int threads) noexcept;

// Adds up what the rows have left, after all of them. `mean_loss` is the loss where it is a weighted mean, whose
// denominator depends on the weights, and 0 elsewhere.
void add_up(const AdjustedCe& job, double mean_loss, bool wide, int threads) noexcept;

}  // namespace ltk
