#include "nearest.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace ltk {
namespace {

template <class Real>
FirstAbove<Real> scan() noexcept;
template <>
FirstAbove<float> scan<float>() noexcept {
    return kernels().first_above_f32;
}
template <>
FirstAbove<double> scan<double>() noexcept {
    return kernels().first_above_f64;
}

template <class Real>
struct Row {
    Real* score;
    int64_t* column;

    bool before(Real s, int64_t c, int64_t b) const noexcept {
        return s > score[b] || (s == score[b] && c < column[b]);
    }
    void swap(int64_t a, int64_t b) const noexcept {
        std::swap(score[a], score[b]);
        std::swap(column[a], column[b]);
    }
    // Hoare's partition of [low, high] around the pair in its middle.
    int64_t partition(int64_t low, int64_t high) const noexcept {
        const int64_t middle = low + (high - low) / 2;
        const Real s = score[middle];
        const int64_t c = column[middle];
        int64_t i = low - 1, j = high + 1;
        while (true) {
            do ++i;
            while (score[i] > s || (score[i] == s && column[i] < c));
            do --j;
            while (before(s, c, j));
            if (i >= j) return j;
            swap(i, j);
        }
    }
    // The `k` first pairs of [0, n) to the front, in any order.
    void select(int64_t n, int64_t k) const noexcept {
        int64_t low = 0, high = n - 1;
        while (low < high) {
            const int64_t at = partition(low, high);
            if (k - 1 <= at)
                high = at;
            else
                low = at + 1;
        }
    }
    void sort(int64_t low, int64_t high) const noexcept {
        while (high - low > 16) {
            const int64_t at = partition(low, high);
            if (at - low < high - at - 1) {  // the shorter part first: the stack stays at log n
                sort(low, at);
                low = at + 1;
            } else {
                sort(at + 1, high);
                high = at;
            }
        }
        for (int64_t i = low + 1; i <= high; ++i) {
            const Real s = score[i];
            const int64_t c = column[i];
            int64_t j = i;
            for (; j > low && before(s, c, j - 1); --j) {
                score[j] = score[j - 1];
                column[j] = column[j - 1];
            }
            score[j] = s;
            column[j] = c;
        }
    }
};

template <class Real>
Row<Real> row_of(const Nearest& job, int64_t i) noexcept {
    return {static_cast<Real*>(job.score) + i * job.room, job.column + i * job.room};
}

template <class Real>
void add_row(const Nearest& job, int64_t i, const Real* values, int64_t columns, int64_t first) noexcept {
    const FirstAbove<Real> next = scan<Real>();
    const Row<Real> row = row_of<Real>(job, i);
    int64_t kept = job.kept[i];
    Real least = static_cast<Real*>(job.least)[i];
    for (int64_t j = 0; j < columns; ++j) {
        if (kept >= job.k) j = next(values, j, columns, least);
        if (j == columns) break;
        row.score[kept] = values[j];
        row.column[kept] = first + j;
        ++kept;
        // Columns come in order, so that a later one never displaces an equal score.
        if (kept == job.room || kept == job.k) {
            row.select(kept, job.k);
            kept = job.k;
            least = *std::min_element(row.score, row.score + job.k);
        }
    }
    job.kept[i] = kept;
    static_cast<Real*>(job.least)[i] = least;
}

template <class Real>
void sort_row(const Nearest& job, int64_t i) noexcept {
    const Row<Real> row = row_of<Real>(job, i);
    const int64_t kept = job.kept[i];
    if (kept > job.k) row.select(kept, job.k);
    job.kept[i] = std::min(kept, job.k);
    row.sort(0, job.kept[i] - 1);
}

}  // namespace

void nearest_add(const Nearest& job, bool single, const void* scores, int64_t stride, int64_t columns, int64_t first,
                 int threads) noexcept {
    parallel_rows(job.rows, 1, threads, [&](int64_t i, int64_t, int) {
        if (single) return add_row(job, i, static_cast<const float*>(scores) + i * stride, columns, first);
        add_row(job, i, static_cast<const double*>(scores) + i * stride, columns, first);
    });
}

void nearest_sort(const Nearest& job, bool single, int threads) noexcept {
    parallel_rows(job.rows, 1, threads,
                  [&](int64_t i, int64_t, int) { single ? sort_row<float>(job, i) : sort_row<double>(job, i); });
}

}  // namespace ltk
