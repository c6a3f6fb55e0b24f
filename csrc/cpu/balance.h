// Assignment of rows to clusters of fixed capacity at near-minimal total cost, for equal-size k-means: an auction
// (Bertsekas).
#pragma once
#include <cstdint>

namespace ltk {

struct Balance {
    const float* cost;  // (rows, stride), finite, at least 0; columns [clusters, stride) hold infinity
    int64_t rows;
    int64_t clusters;
    int64_t stride;           // a multiple of 16
    const int64_t* capacity;  // (clusters,) at least 1, summing to `rows`
    float epsilon;     // smallest raise of a price, above 0; the total cost is within rows * epsilon of the optimum
    float* price;      // (stride,) zeros at first, infinity never; a second call may start from the first one's
    int64_t* label;    // (rows,) out: the cluster of each row
    int64_t* scratch;  // 2 * rows + 2 * clusters
    float* bid;        // (rows,) scratch
};

// Rows bid one at a time in a fixed order: the result depends on nothing but the arguments.
using BalanceRows = void (*)(const Balance& job) noexcept;

void balance(const Balance& job) noexcept;

}  // namespace ltk
