// Adjusted softmax cross-entropy: the whole long-tail family in one row operation (csrc/README.md has the formula).
#pragma once
#include <cstdint>

namespace ltk {

// What a per-class vector cannot say, computed inside the kernel (closed_forms.inl). A form comes without shift, scale
// and margin, but for the margin of the cloud, shift and scale of the sigmoid, and shift of the von Mises-Fisher form.
enum class Form : int {
    none = 0,
    seesaw = 1,        // table: log counts; options: p, q, log eps
    equalization = 2,  // table: 1 for the classes that may be masked, else 0; seed; options: probability of the mask
    arcface = 3,       // options: cos m, sin m, 1 for the straight-through gradient
    sigmoid = 4,  // table: factor of a class as a negative, or null; options: threshold, 1 where a second row of the
                  // table has its factor as a positive. Not a softmax at all: see sigmoid_bce.inl
    cloud = 5,    // table: largest size of a class' noise; seed
    vmf = 6,      // logits: cosines. table: kappa, sqrt(1 + x^2) and log S of each class, a row each; options: number
                  // of features, temperature; with plain labels alone
};
struct ClosedForm {
    Form form;
    const void* table;    // (classes,) real
    const int64_t* seed;  // one number
    double options[3];
};

struct VectorGradients;  // vector_gradients.h

// Pointers only; the caller has checked every shape. "real" is double for float64 logits, float for all others; every
// table, row coefficient, row loss and scratch element is real. A null table means its neutral value.
struct AdjustedCe {
    const void* logits;       // rows x classes, unit class stride
    int64_t logits_stride;    // elements between rows
    const int64_t* target;    // (rows,)
    const int64_t* target_b;  // (rows,) second label of mixed rows, or null
    const void* lam;          // (rows,) share of `target` in mixed rows; with target_b
    const void* shift;        // (classes,)
    const void* scale;
    const void* margin;
    const void* row_scale;
    const void* weight;
    const void* smoothing;      // (classes,) label smoothing of each label, in place of `label_smoothing`, or null
    const void* label_scale;    // (classes,) factor on the label's own logit
    const void* sample_weight;  // (rows,) factor on each row's loss, or null
    const void* row_coef;       // (rows,) factor on each row's gradient (an upstream gradient), or null
    double focal_gamma;
    double label_smoothing;
    int64_t ignore_index;
    int64_t rows;
    int64_t classes;
    double grad_scale;       // factor on every gradient: 1 / denominator of the reduction
    double smoothing_total;  // sum of the weights over the classes (the number of classes without weights)
    void* row_loss;          // (rows,)
    void* grad;              // rows x classes in the logits' type, or null: loss only. May be the logits' own memory.
    int64_t grad_stride;
    bool stream;  // write the gradient past the caches
    ClosedForm closed;
    const VectorGradients* vectors;  // gradients of the tables, or null; then shift is given, and grad may be null
};

enum class Reduction : int { none = 0, mean = 1, batch_mean = 2, sum = 3 };

// The rows [begin, end) on one instruction set. `scratch` holds adjusted_ce_scratch(classes) reals.
using AdjustedCeRows = void (*)(const AdjustedCe& job, int64_t begin, int64_t end, void* scratch) noexcept;

// Columns that are handled while they sit in the first-level cache: logits, tables and exponentials of a block take 4 x
// 8 KiB.
constexpr int64_t kBlock = 2048;

// Reals of scratch one thread needs: three rows (exponentials; the first gradient of a mixed row; the term of a closed
// form), each rounded up to whole vectors, and one reference a block.
constexpr int64_t adjusted_ce_row(int64_t classes) noexcept {
    return (classes + 63) / 64 * 64;
}
constexpr int64_t adjusted_ce_scratch(int64_t classes) noexcept {
    return 3 * adjusted_ce_row(classes) + adjusted_ce_row((classes + kBlock - 1) / kBlock);
}

// Reals of scratch and row losses that a call keeps on its own stack when `scratch` is null: an allocation from Python
// would take a third of a small call's time.
constexpr int64_t kStack = 8192;

constexpr int64_t kSampleWeight = 7;  // its number among what can be refused, after the tables

// Loss and gradient of a whole batch. Returns -1; or the first row whose label is neither in [0, classes) nor
// ignore_index; or -2 - t where table t (shift, scale, margin, row_scale, weight, smoothing, label_scale,
// sample_weight) has an entry that is not finite, or no share in smoothing. Nothing has been written unless it returns
// -1. `*loss` (real) is written unless the reduction is none. `scratch` holds threads * adjusted_ce_scratch(classes)
// reals.
int64_t adjusted_ce(AdjustedCe job, int dtype, Reduction reduction, void* loss, void* scratch, int threads) noexcept;

// What `adjusted_ce` does before its rows: the checks, with its return value, what the reduction divides by, and the
// job's grad_scale and smoothing_total. `wide`: reals are doubles.
int64_t adjusted_ce_prepare(AdjustedCe& job, bool wide, Reduction reduction, double* denominator) noexcept;

}  // namespace ltk
