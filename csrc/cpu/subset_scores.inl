// Body of subset_scores.h; Packed and log_det_pack come from logdet.inl. Everything below works on a pack of subsets at
// a time, one per lane. W = B X is a small GEMM whose columns are the lanes; the rest (mean, Gram, LDL^T) is plain
// scalar code over lanes.
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
template <class Real, int R, int C>
static inline void whiten_tile(const Real* b, int64_t b_stride, const Pack<Real>* x, int64_t stride, int64_t depth,
                               bool more, Pack<Real>* w) {
    Pack<Real> sum[R][C] = {};
    if (more)
        for (int r = 0; r < R; ++r)
            for (int c = 0; c < C; ++c) sum[r][c] = w[r * stride + c];
    for (int64_t k = 0; k < depth; ++k) {
        Pack<Real> column[C];
        for (int c = 0; c < C; ++c) column[c] = x[k * stride + c];
        for (int r = 0; r < R; ++r) {
            const Real scalar = b[r * b_stride + k];
            for (int c = 0; c < C; ++c) sum[r][c] += scalar * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) w[r * stride + c] = sum[r][c];
}

template <class Real, int R, int C>
static inline void whiten_columns(const Real* b, int64_t b_stride, const Pack<Real>* x, int64_t size, int64_t depth,
                                  bool more, Pack<Real>* w) {
    int64_t c = 0;
    for (; c + C <= size; c += C) whiten_tile<Real, R, C>(b, b_stride, x + c, size, depth, more, w + c);
    for (; c < size; ++c) whiten_tile<Real, R, 1>(b, b_stride, x + c, size, depth, more, w + c);
}

// w = B x for one pack and lower triangular B, a block of x rows at a time: the block stays in the first-level cache
// while every row of B passes over it.
template <class Real>
static inline void whiten(const Real* basis, const Pack<Real>* x, int64_t size, int64_t d, Pack<Real>* w) {
    const int64_t fitting = kBlockBytes / (size * 64);
    const int64_t block = fitting < 8 ? 8 : fitting;
    for (int64_t k = 0; k < d; k += block) {
        const int64_t last = k + block < d ? k + block : d;
        // Rows of B above row k have nothing in this block, and the rows of a tile that straddle it meet zeros.
        int64_t row = k / kTileRows * kTileRows;
        for (; row + kTileRows <= d; row += kTileRows) {
            const int64_t end = row + kTileRows < last ? row + kTileRows : last;
            whiten_columns<Real, kTileRows, kTileColumns>(basis + row * d + k, d, x + k * size, size, end - k, k > 0,
                                                          w + row * size);
        }
        for (; row < d; ++row) {
            const int64_t end = row + 1 < last ? row + 1 : last;
            whiten_columns<Real, 1, kTileColumns>(basis + row * d + k, d, x + k * size, size, end - k, k > 0,
                                                  w + row * size);
        }
    }
}

// gram[i][j] = sum over k of w[k][i] w[k][j] for an R x C tile
template <class Real, int R, int C>
static inline void gram_tile(const Pack<Real>* wi, const Pack<Real>* wj, int64_t size, int64_t d, Pack<Real>* gram) {
    Pack<Real> sum[R][C] = {};
    for (int64_t k = 0; k < d; ++k) {
        Pack<Real> column[C];
        for (int c = 0; c < C; ++c) column[c] = wj[k * size + c];
        for (int r = 0; r < R; ++r) {
            const Pack<Real> row = wi[k * size + r];
            for (int c = 0; c < C; ++c) sum[r][c] += row * column[c];
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) gram[r * size + c] = sum[r][c];
}

template <class Real, int R>
static inline void gram_rows(const Pack<Real>* w, int64_t i, int64_t size, int64_t d, Pack<Real>* gram) {
    int64_t j = 0;
    for (; j + kGramTile <= i + R; j += kGramTile)
        gram_tile<Real, R, kGramTile>(w + i, w + j, size, d, gram + i * size + j);
    for (; j < i + R; ++j) gram_tile<Real, R, 1>(w + i, w + j, size, d, gram + i * size + j);
}

// log det(I + w^T w) of the columns w (d, size), and tr(w^T w) where `traces` is given
template <class Real>
static inline void log_det_of_gram(const Pack<Real>* w, int64_t size, int64_t d, Pack<Real>* gram, double* out,
                                   double* traces) {
    int64_t i = 0;
    for (; i + kGramTile <= size; i += kGramTile) gram_rows<Real, kGramTile>(w, i, size, d, gram);
    for (; i < size; ++i) gram_rows<Real, 1>(w, i, size, d, gram);
    Pack<Real> trace = {};
    for (i = 0; i < size; ++i) {
        trace += gram[i * size + i];
        gram[i * size + i] += Real(1);
    }
    log_det_pack<Real>(gram, size, out);
    if (traces == nullptr) return;
    for (int lane = 0; lane < kLanes<Real>; ++lane) traces[lane] = trace[lane];
}

template <class Real>
static inline void subset_scores_packs(const SubsetScores<Real>& job, int64_t begin, int64_t end, Real* scratch) {
    const int64_t d = job.d;
    for (int64_t p = begin; p < end; ++p) {
        const int64_t size = job.pack_size[p], group = job.pack_group[p];
        const Pack<Real>* x = reinterpret_cast<const Pack<Real>*>(job.pool + job.pack_start[p]);
        const Real* centre = job.centre + group * d;
        Pack<Real>* w = reinterpret_cast<Pack<Real>*>(scratch);
        Pack<Real>* gram = w + d * size;
        whiten<Real>(job.basis + group * d * d, x, size, d, w);

        // Y' = (X - mean 1^T)(I - h 11^T) = X - v 1^T with v = (1 - h size) mean + h X 1; anchor = inf gives h = 0.
        const double step = (1.0 - std::sqrt(1.0 - size / (job.anchor + size))) / size;
        const Real h = static_cast<Real>(step), keep = static_cast<Real>(1.0 - step * size);
        for (int64_t k = 0; k < d; ++k) {
            Pack<Real> sum = w[k * size];
            for (int64_t i = 1; i < size; ++i) sum += w[k * size + i];
            const Pack<Real> v = keep * centre[k] + h * sum;
            for (int64_t i = 0; i < size; ++i) w[k * size + i] -= v;
        }
        const int64_t at = p * kLanes<Real>;
        log_det_of_gram<Real>(w, size, d, gram, job.out + at, job.traces == nullptr ? nullptr : job.traces + at);
    }
}

static void subset_scores_f64(const SubsetScores<double>& job, int64_t begin, int64_t end, double* scratch) noexcept {
    subset_scores_packs<double>(job, begin, end, scratch);
}

static void subset_scores_f32(const SubsetScores<float>& job, int64_t begin, int64_t end, float* scratch) noexcept {
    subset_scores_packs<float>(job, begin, end, scratch);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
