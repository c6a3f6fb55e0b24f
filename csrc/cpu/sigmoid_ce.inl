// Body of sigmoid_ce.h, on the row of sigmoid_bce.inl.

namespace ltk {
namespace LTK_NAMESPACE {

template <class V, bool Dense, class T, class Hot>
static bool sigmoid_ce_rows_of(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    using Real = typename V::Real;
    SigmoidRow<Real, Hot> row{};
    row.tables = &job.tables;
    row.classes = job.classes;
    row.label = -1;
    row.ignored = static_cast<Real>(job.ignore_index);
    if (job.statistics != nullptr) {
        row.of_positives = static_cast<Real*>(job.columns) + begin / job.slice * 2 * adjusted_ce_row(job.classes);
        row.of_negatives = row.of_positives + adjusted_ce_row(job.classes);
        std::memset(row.of_positives, 0, static_cast<size_t>(2 * adjusted_ce_row(job.classes)) * sizeof(Real));
    }
    bool known = true;
    for (int64_t i = begin; i < end; ++i) {
        const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
        Real* grad = job.grad == nullptr ? nullptr : static_cast<Real*>(job.grad) + i * job.classes;
        if constexpr (Dense)
            row.hot = static_cast<const Hot*>(job.hot) + i * job.hot_stride;
        else
            row.label = job.target[i];
        if (!sigmoid_ce_counts(job, i)) {
            static_cast<Real*>(job.row_loss)[i] = 0;
            if (grad != nullptr) std::memset(grad, 0, static_cast<size_t>(job.classes) * sizeof(Real));
            continue;
        }
        row.hard =
            job.sample_weight == nullptr ? 1.0 : static_cast<double>(static_cast<const Real*>(job.sample_weight)[i]);
        if (!Dense && job.weight != nullptr)
            row.hard *= static_cast<double>(static_cast<const Real*>(job.weight)[row.label]);
        row.upstream = job.grad_scale;
        if (job.row_coef != nullptr) row.upstream *= static_cast<double>(static_cast<const Real*>(job.row_coef)[i]);
        const Real* nothing = nullptr;
        const double loss = sigmoid_row<V, true, true, Dense>(row, z, nothing, grad);
        static_cast<Real*>(job.row_loss)[i] = static_cast<Real>(loss);
        known &= !row.bad;
    }
    return known;
}

template <class V, class T>
static bool sigmoid_ce_rows(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    if (job.hot_type == Hot::u8) return sigmoid_ce_rows_of<V, true, T, uint8_t>(job, begin, end);
    if (job.hot_type == Hot::f32) return sigmoid_ce_rows_of<V, true, T, float>(job, begin, end);
    return sigmoid_ce_rows_of<V, false, T, float>(job, begin, end);
}

static bool sigmoid_ce_f32(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    return sigmoid_ce_rows<F32, float>(job, begin, end);
}
static bool sigmoid_ce_f64(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    return sigmoid_ce_rows<F64, double>(job, begin, end);
}
static bool sigmoid_ce_bf16(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    return sigmoid_ce_rows<F32, bf16>(job, begin, end);
}
static bool sigmoid_ce_f16(const SigmoidCe& job, int64_t begin, int64_t end) noexcept {
    return sigmoid_ce_rows<F32, f16>(job, begin, end);
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
