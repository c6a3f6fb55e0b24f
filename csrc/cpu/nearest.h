// The k largest scores of every row, over columns that arrive in chunks: what exact nearest neighbours need beside a
// matrix product.
#pragma once
#include <cstdint>

namespace ltk {

// State of `rows` searches: `kept` pairs a row in no order, of which nothing is forgotten that may be among the k
// largest. Ties go to the smaller column.
struct Nearest {
    int64_t rows;
    int64_t k;
    int64_t room;     // pairs that a row has room for, above k
    void* score;      // (rows, room) float or double
    int64_t* column;  // (rows, room)
    int64_t* kept;    // (rows,) pairs; 0 at first
    void* least;      // (rows,) once k pairs are kept, no score up to this one can join
};

// The first place in [begin, end) whose value exceeds `least`; `end` where there is none.
template <class Real>
using FirstAbove = int64_t (*)(const Real* values, int64_t begin, int64_t end, Real least) noexcept;

// Adds the columns first .. first + columns of every row; scores are rows x columns, finite.
void nearest_add(const Nearest& job, bool single, const void* scores, int64_t stride, int64_t columns, int64_t first,
                 int threads) noexcept;

// Leaves the k first pairs of every row in order: larger scores first, then smaller columns. Rows that have fewer keep
// what they have.
void nearest_sort(const Nearest& job, bool single, int threads) noexcept;

}  // namespace ltk
