// Body of subset_scores.h; Pack and log_det_pack come from logdet.inl. Everything below works on eight subsets at a
// time, one per lane of a pack. W = B X is a small GEMM whose columns are the lanes; the rest (mean, Gram, LDL^T) is
// plain scalar code over lanes.
#include <cmath>

namespace ltk {
namespace LTK_NAMESPACE {

// Register tiles: rows x columns accumulators of 64 bytes, plus one row of columns, must fit the register file, or the
// inner loop spills.
#if defined(__AVX512F__)
constexpr int kTileRows = 4, kTileColumns = 5, kGramTile = 5;
#elif defined(__AVX__)
constexpr int kTileRows = 4, kTileColumns = 1, kGramTile = 2;
#else
constexpr int kTileRows = 2, kTileColumns = 1, kGramTile = 1;
#endif
// Of a first-level data cache of 48 KiB; a whole pack of 10 samples at d = 64.
constexpr int64_t kBlockBytes = 40960;

// w[r][c] = sum over k < depth of b[r][k] x[k][c], on top of what w holds if `more`
template <int R, int C>
static inline void whiten_tile(const double* b, int64_t b_stride, const Pack* x, int64_t stride, int64_t depth,
                               bool more, Pack* w) {
    Pack sum[R][C] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] = w[r * stride + c];
    for (int64_t k = 0; k < depth; ++k) {
        Pack column[C];
        for (int c = 0; c < C; ++c) column[c] = x[k * stride + c];
        for (int r = 0; r < R; ++r) {
            const double scalar = b[r * b_stride + k];
            for (int c = 0; c < C; ++c) sum[r][c] += scalar * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) w[r * stride + c] = sum[r][c];
}

template <int R, int C>
static inline void whiten_columns(const double* b, int64_t b_stride, const Pack* x, int64_t size, int64_t depth,
                                  bool more, Pack* w) {
    int64_t c = 0;
    for (; c + C <= size; c += C) whiten_tile<R, C>(b, b_stride, x + c, size, depth, more, w + c);
    for (; c < size; ++c) whiten_tile<R, 1>(b, b_stride, x + c, size, depth, more, w + c);
}

// w = B x for one pack, a block of x rows at a time: the block stays in the first-level cache while every row of B
// passes over it.
static inline void whiten(const double* basis, bool lower, const Pack* x, int64_t size, int64_t d, Pack* w) {
    const int64_t fitting = kBlockBytes / (size * static_cast<int64_t>(sizeof(Pack)));
    const int64_t block = fitting < 8 ? 8 : fitting;
    for (int64_t k = 0; k < d; k += block) {
        const int64_t last = k + block < d ? k + block : d;
        // Rows of a lower triangular B above row k have nothing in this block, and the rows of a tile that straddle it
        // meet zeros.
        int64_t row = lower ? k / kTileRows * kTileRows : 0;
        for (; row + kTileRows <= d; row += kTileRows) {
            const int64_t end = lower && row + kTileRows < last ? row + kTileRows : last;
            whiten_columns<kTileRows, kTileColumns>(basis + row * d + k, d, x + k * size, size, end - k, k > 0,
                                                    w + row * size);
        }
        for (; row < d; ++row) {
            const int64_t end = lower && row + 1 < last ? row + 1 : last;
            whiten_columns<1, kTileColumns>(basis + row * d + k, d, x + k * size, size, end - k, k > 0, w + row * size);
        }
    }
}

// gram[i][j] = sum over k of w[k][i] w[k][j] for an R x C tile
template <int R, int C>
static inline void gram_tile(const Pack* wi, const Pack* wj, int64_t size, int64_t d, Pack* gram) {
    Pack sum[R][C] = {};
    for (int64_t k = 0; k < d; ++k) {
        Pack column[C];
        for (int c = 0; c < C; ++c) column[c] = wj[k * size + c];
        for (int r = 0; r < R; ++r) {
            const Pack row = wi[k * size + r];
            for (int c = 0; c < C; ++c) sum[r][c] += row * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) gram[r * size + c] = sum[r][c];
}

template <int R>
static inline void gram_rows(const Pack* w, int64_t i, int64_t size, int64_t d, Pack* gram) {
    int64_t j = 0;
    for (; j + kGramTile <= i + R; j += kGramTile) gram_tile<R, kGramTile>(w + i, w + j, size, d, gram + i * size + j);
    for (; j < i + R; ++j) gram_tile<R, 1>(w + i, w + j, size, d, gram + i * size + j);
}

// log det(I + w^T w) of the columns w (d, size)
static inline void log_det_of_gram(const Pack* w, int64_t size, int64_t d, Pack* gram, double* out) {
    int64_t i = 0;
    for (; i + kGramTile <= size; i += kGramTile) gram_rows<kGramTile>(w, i, size, d, gram);
    for (; i < size; ++i) gram_rows<1>(w, i, size, d, gram);
    for (i = 0; i < size; ++i) gram[i * size + i] += 1.0;
    Pack total = {};
    log_det_pack(gram, size, total);
    *reinterpret_cast<Pack*>(out) = total;
}

static void subset_scores_f64(const SubsetScores& job, int64_t begin, int64_t end, double* scratch) noexcept {
    const int64_t d = job.d;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t size = job.pack_size[p];
        const Pack* x = reinterpret_cast<const Pack*>(job.pool + job.pack_start[p]);
        Pack* w = reinterpret_cast<Pack*>(scratch);
        Pack* gram = w + d * size;

        const Pack* source = x;
        if (job.basis != nullptr) {
            whiten(job.basis, job.lower, x, size, d, w);
            source = w;
        }

        // Y' = (X - mean 1^T)(I - h 11^T) = X - v 1^T with v = (1 - h size) mean + h X 1; anchor = inf gives h = 0.
        const double h = (1.0 - std::sqrt(1.0 - size / (job.anchor + size))) / size;
        const double keep = 1.0 - h * size;
        const double* scale = job.scales == nullptr ? nullptr : job.scales + job.pack_scale[p] * d;
        for (int64_t k = 0; k < d; ++k) {
            Pack sum = source[k * size];
            for (int64_t i = 1; i < size; ++i) sum += source[k * size + i];
            const Pack v = keep * job.centre[k] + h * sum;
            const double factor = scale == nullptr ? 1.0 : scale[k];
            for (int64_t i = 0; i < size; ++i) w[k * size + i] = (source[k * size + i] - v) * factor;
        }

        log_det_of_gram(w, size, d, gram, job.out + p * kPackLanes);
        if (job.within == nullptr) continue;
        for (int64_t k = 0; k < d; ++k) {
            Pack sum = w[k * size];
            for (int64_t i = 1; i < size; ++i) sum += w[k * size + i];
            const Pack v = sum * (1.0 / size);
            for (int64_t i = 0; i < size; ++i) w[k * size + i] -= v;
        }
        log_det_of_gram(w, size, d, gram, job.within + p * kPackLanes);
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
