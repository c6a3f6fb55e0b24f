// Where the rows of adjusted_ce.inl leave the gradients of the tables (vector_gradients.h).

namespace ltk {
namespace LTK_NAMESPACE {

// Null: not wanted.
template <class Real>
struct TableSums {
    Real* shift;  // column sums of the slice
    Real* scale;
    Real* terms;  // kRowTerms of this label of this row
    bool row_scale;
};

// The column sums of the slice that begins at row `begin`, at 0.
template <class Real>
static inline TableSums<Real> table_sums(const AdjustedCe& job, int64_t begin) noexcept {
    const VectorGradients& v = *job.vectors;
    const int columns = (v.out[0] != nullptr) + (v.out[1] != nullptr);
    Real* first = static_cast<Real*>(v.columns) + begin / v.slice * columns * v.stride;
    std::memset(first, 0, static_cast<size_t>(columns * v.stride) * sizeof(Real));
    TableSums<Real> sums{};
    if (v.out[0] != nullptr) sums.shift = first;
    if (v.out[1] != nullptr) sums.scale = v.out[0] != nullptr ? first + v.stride : first;
    sums.row_scale = v.out[3] != nullptr;
    return sums;
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
