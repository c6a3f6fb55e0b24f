// Rows of few classes, one row a lane. A row of 10 logits fills no vector, and its horizontal sums cost more than its
// exponentials: so V::N rows are transposed into columns, and every step but the logarithm is vertical. Measured at 128
// x 10: a quarter of the time of the row-wise body. Plain class indices only; mixed labels, smoothing, and tables'
// gradients beside a label scale go to the row-wise body.

namespace ltk {
namespace LTK_NAMESPACE {

// Where the transposition stops paying: measured crossover with the row-wise body near 30 columns.
constexpr int64_t kNarrow = 32;

template <class V>
static inline bool narrow_serves(const AdjustedCe& job) noexcept {
    return V::N > 1 && job.classes <= kNarrow && job.target_b == nullptr && job.label_smoothing == 0.0 &&
           job.smoothing == nullptr && (job.label_scale == nullptr || job.vectors == nullptr);
}

template <class V, bool Scale, bool Shift, class T, bool Tables>
static void narrow_rows(const AdjustedCe& job, int64_t begin, int64_t end) noexcept {
    using Real = typename V::Real;
    using Reg = typename V::Reg;
    constexpr int64_t n = V::N;
    const Real* scale = static_cast<const Real*>(job.scale);
    const Real* shift = static_cast<const Real*>(job.shift);
    const Real* weight = static_cast<const Real*>(job.weight);
    const Real* label_scale = static_cast<const Real*>(job.label_scale);
    Real* row_loss = static_cast<Real*>(job.row_loss);
    const int64_t classes = job.classes;
    alignas(64) Real x[kNarrow * n];  // column j of the group: x[j * n + lane]
    alignas(64) Real sigma[n], label_a[n], others[n], missing[n], label_e[n], below[n], k[n];
    // For the tables' gradients: logits and column sums as x, the rest a lane each.
    constexpr int64_t tables = Tables ? n : 0;
    alignas(64) Real logit[kNarrow * tables + 1], shift_sum[kNarrow * tables + 1], scale_sum[kNarrow * tables + 1];
    alignas(64) Real label_u[tables + 1], label_h[tables + 1], k_row[tables + 1];
    const Reg lowest = V::set(std::numeric_limits<Real>::lowest());  // a masked class' h is 0, and 0 inf is not
    TableSums<Real> sums{};
    if constexpr (Tables) {
        sums = table_sums<Real>(job, begin);
        for (int64_t at = 0; at < classes * n; ++at) shift_sum[at] = scale_sum[at] = 0;
    }

    for (int64_t group = begin; group < end; group += n) {
        const int64_t lanes = end - group < n ? end - group : n;
        for (int64_t lane = 0; lane < n; ++lane) {
            sigma[lane] = 1;
            label_a[lane] = 0;
            k[lane] = 0;
            if constexpr (Tables) label_u[lane] = label_h[lane] = k_row[lane] = 0;
            const int64_t i = group + lane;
            const int64_t label = lane < lanes ? job.target[i] : job.ignore_index;
            if (label == job.ignore_index) {  // whatever an ignored row holds
                for (int64_t j = 0; j < classes; ++j) x[j * n + lane] = 0;
                continue;
            }
            const T* z = static_cast<const T*>(job.logits) + i * job.logits_stride;
            for (int64_t j = 0; j < classes; ++j) x[j * n + lane] = static_cast<Real>(get(z + j));
            const Term<Real> term = make_term<V>(job, get(z + label), label, 1.0);
            sigma[lane] = static_cast<Real>(term.sigma);
            label_a[lane] = static_cast<Real>(term.target_a);
            if constexpr (Tables) label_u[lane] = static_cast<Real>(term.target_u);
        }

        const Reg sigma_v = V::load(sigma, V::all());
        Reg top = V::load(label_a, V::all());
        for (int64_t j = 0; j < classes; ++j) {
            Reg a = V::load(x + j * n, V::all());
            if constexpr (Tables) V::store(logit + j * n, a, V::all());
            if (Scale && Shift) a = V::fma(V::set(scale[j]), a, V::set(shift[j]));
            if (Scale && !Shift) a = V::mul(V::set(scale[j]), a);
            if (!Scale && Shift) a = V::add(a, V::set(shift[j]));
            V::store(x + j * n, V::mul(sigma_v, a), V::all());
        }
        // The label's own column entry steps aside: its margin is in label_a, and the sum of the others must not hold
        // it.
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t label = job.target[group + lane];
            if (label != job.ignore_index) x[label * n + lane] = -static_cast<Real>(INFINITY);
        }
        for (int64_t j = 0; j < classes; ++j) top = V::max(top, V::load(x + j * n, V::all()));
        // With what each addition rounds away beside it (Knuth's two-sum): of ten terms that rounding would be the
        // largest error of the gradient.
        Reg sum = V::set(0), lost = V::set(0);
        for (int64_t j = 0; j < classes; ++j) {
            const Reg e = V::exp(V::sub(V::load(x + j * n, V::all()), top));
            V::store(x + j * n, e, V::all());
            const Reg next = V::add(sum, e), of_e = V::sub(next, sum);
            lost = V::add(lost, V::add(V::sub(sum, V::sub(next, of_e)), V::sub(e, of_e)));
            sum = next;
        }
        const Reg label_v = V::sub(V::load(label_a, V::all()), top);
        V::store(others, sum, V::all());
        V::store(missing, lost, V::all());
        V::store(below, label_v, V::all());
        V::store(label_e, V::exp(label_v), V::all());

        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t i = group + lane;
            const int64_t label = job.target[i];
            if (label == job.ignore_index) {
                row_loss[i] = 0;
                continue;
            }
            const double rest = static_cast<double>(others[lane]) + missing[lane], own = label_e[lane],
                         total = rest + own;
            const double nll = below[lane] > -1 ? log1p_of<Real>(rest / own) : std::log(total) - below[lane];
            double phi, slope;
            focal(job.focal_gamma, nll, &phi, &slope);
            const double hard = weight == nullptr ? 1.0 : static_cast<double>(weight[label]);
            put_loss<Real>(job, i, hard * phi);
            const double upstream = upstream_of<Real>(job, i);
            const double outer = upstream * static_cast<double>(sigma[lane]) * hard * slope / total;
            k[lane] = static_cast<Real>(outer);
            double label_grad = -outer * rest * (Scale ? static_cast<double>(scale[label]) : 1.0);
            if (label_scale != nullptr) label_grad *= static_cast<double>(label_scale[label]);
            label_a[lane] = static_cast<Real>(label_grad);
            if constexpr (Tables) {
                label_h[lane] = static_cast<Real>(-outer * rest);
                k_row[lane] = static_cast<Real>(upstream * hard * slope / total);
                Real* terms = static_cast<Real*>(job.vectors->terms) + i * kRowTerms;
                terms[0] = -label_h[lane];
                terms[2] = static_cast<Real>(upstream * phi);
            }
        }

        const Reg k_v = V::load(k, V::all());
        if constexpr (Tables) {
            if (sums.row_scale) {
                Reg along = V::set(0);
                for (int64_t j = 0; j < classes; ++j) {
                    Reg u = V::load(logit + j * n, V::all());
                    if (Scale) u = V::mul(V::set(scale[j]), u);
                    u = V::max(V::add(u, V::set(shift[j])), lowest);
                    const Reg apart = V::sub(u, V::load(label_u, V::all()));
                    along = V::fma(V::load(x + j * n, V::all()), apart, along);
                }
                V::store(below, V::mul(along, V::load(k_row, V::all())), V::all());
                for (int64_t lane = 0; lane < lanes; ++lane)
                    static_cast<Real*>(job.vectors->terms)[(group + lane) * kRowTerms + 1] = below[lane];
            }
            // h, the label's own entry included, in a copy: x goes on as it does without tables.
            alignas(64) Real h[kNarrow * n];
            for (int64_t j = 0; j < classes; ++j)
                V::store(h + j * n, V::mul(k_v, V::load(x + j * n, V::all())), V::all());
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t label = job.target[group + lane];
                if (label != job.ignore_index) h[label * n + lane] = label_h[lane];
            }
            for (int64_t j = 0; j < classes; ++j) {
                const Reg own = V::load(h + j * n, V::all());
                const Reg z = V::max(V::load(logit + j * n, V::all()), lowest);
                V::store(shift_sum + j * n, V::add(V::load(shift_sum + j * n, V::all()), own), V::all());
                V::store(scale_sum + j * n, V::fma(own, z, V::load(scale_sum + j * n, V::all())), V::all());
            }
        }
        if (job.grad == nullptr) continue;

        for (int64_t j = 0; j < classes; ++j) {
            Reg g = V::mul(k_v, V::load(x + j * n, V::all()));
            if (Scale) g = V::mul(g, V::set(scale[j]));
            V::store(x + j * n, g, V::all());
        }
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t i = group + lane;
            const int64_t label = job.target[i];
            T* grad = static_cast<T*>(job.grad) + i * job.grad_stride;
            if (label == job.ignore_index) {
                std::memset(static_cast<void*>(grad), 0, static_cast<size_t>(classes) * sizeof(T));
                continue;
            }
            x[label * n + lane] = label_a[lane];
            for (int64_t j = 0; j < classes; ++j) put(x[j * n + lane], grad + j);
        }
    }
    if constexpr (Tables) {
        for (int64_t j = 0; j < classes; ++j) {
            if (sums.shift != nullptr) sums.shift[j] = V::horizontal_sum(V::load(shift_sum + j * n, V::all()));
            if (sums.scale != nullptr) sums.scale[j] = V::horizontal_sum(V::load(scale_sum + j * n, V::all()));
        }
    }
}

}  // namespace LTK_NAMESPACE
}  // namespace ltk
