// exp, and the loss with all its tables, against float64 written plainly.
#include "host.h"
#include "isa.h"

namespace ltk {
namespace cpu_host {
// ---- exp ----

void check_exp() {
    std::vector<float> x, y;
    for (int i = 0; i <= 200000; ++i) x.push_back(-86.5f + static_cast<float>(i) * (174.5f / 200000.0f));
    for (const float special : {0.0f, -86.6f, -1000.0f, -INFINITY, NAN}) x.push_back(special);
    y.resize(x.size());
    kernels().exp_f32(x.data(), y.data(), static_cast<int64_t>(x.size()));
    for (size_t i = 0; i < x.size(); ++i) {
        const double exact = x[i] < -86.5f ? 0.0 : std::exp(static_cast<double>(x[i]));
        const float nearest = static_cast<float>(exact);
        within("exp", 0, static_cast<double>(y[i]), exact,
               1.5 * (static_cast<double>(std::nextafter(nearest, INFINITY)) - static_cast<double>(nearest)));
    }
}

namespace {

// ---- the loss with its tables, against float64 written plainly ----

Result written_plainly(const Loss& loss) {
    const auto at = [](const Numbers& table, size_t i, double neutral) { return table.empty() ? neutral : table[i]; };
    const size_t n = static_cast<size_t>(loss.classes);
    Result out;
    double weights = 0.0, total = 0.0;
    for (size_t i = 0; i < static_cast<size_t>(loss.rows); ++i) {
        Numbers grad(n, 0.0);
        double row = 0.0, size = 0.0;
        for (int which = 0; which < (loss.target_b.empty() ? 1 : 2) && loss.target[i] != -100; ++which) {
            const size_t y = static_cast<size_t>(which == 0 ? loss.target[i] : loss.target_b[i]);
            double share = loss.target_b.empty() ? 1.0 : which == 0 ? loss.lam[i] : 1.0 - loss.lam[i];
            share *= at(loss.sample_weight, i, 1.0);
            const double sigma = at(loss.row_scale, y, 1.0), kappa = at(loss.label_scale, y, 1.0);
            const double eps = at(loss.smoothing, y, loss.label_smoothing);
            Numbers a(n);
            double top = -INFINITY, sum = 0.0, others = 0.0, all_weights = 0.0;
            for (size_t j = 0; j < n; ++j) {
                const double own = j == y ? kappa : 1.0;
                a[j] = own * at(loss.scale, j, 1.0) * loss.logits[i * n + j] + at(loss.shift, j, 0.0);
                a[j] = sigma * (a[j] - (j == y ? at(loss.margin, j, 0.0) : 0.0));
                top = std::fmax(top, a[j]);
                if (std::isfinite(a[j])) size = std::fmax(size, std::abs(a[j]));
                all_weights += at(loss.weight, j, 1.0);
            }
            for (size_t j = 0; j < n; ++j) (j == y ? sum : others) += std::exp(a[j] - top);
            sum += others;
            const double nll = a[y] == top ? std::log1p(others) : std::log(sum) - (a[y] - top);
            const double q = -std::expm1(-nll), p_y = std::exp(a[y] - top) / sum;
            double phi = nll, slope = 1.0;
            if (loss.focal != 0.0) {
                phi = q > 0 ? std::pow(q, loss.focal) * nll : 0.0;
                slope = q > 0 ? std::pow(q, loss.focal) + loss.focal * nll * p_y * std::pow(q, loss.focal - 1) : 0.0;
            }
            const double hard = (1 - eps) * at(loss.weight, y, 1.0) * share;
            const double soft = eps / static_cast<double>(n) * share;
            row += hard * phi;
            for (size_t j = 0; j < n; ++j) {
                const double p = std::exp(a[j] - top) / sum, alpha = at(loss.weight, j, 1.0);
                double g = j == y ? -hard * slope * (others / sum) : hard * slope * p;
                if (eps != 0.0) {
                    row -= soft * alpha * (a[j] - top - std::log(sum));
                    g += soft * (all_weights * p - alpha);
                }
                grad[j] += sigma * (j == y ? kappa : 1.0) * at(loss.scale, j, 1.0) * g;
            }
            weights += share * at(loss.weight, y, 1.0);
        }
        total += row;
        out.rows.push_back(row);
        out.size.push_back(size);
        out.grad.insert(out.grad.end(), grad.begin(), grad.end());
    }
    for (double& g : out.grad) g /= weights;
    out.mean = total / weights;
    return out;
}

template <class T>
void check_loss(Loss loss, double cond) {
    loss.logits = rounded<T>(loss.logits);
    const Result expected = written_plainly(loss);
    const Tolerance &t = kTolerances[kCode<T>], &real = kTolerances[kCode<RealOf<T>>];
    for (const int threads : {1, 2}) {
        const Result got = by_kernel<T>(loss, threads);
        compare_rows("gradient", kCode<T>, got.grad, expected.grad, loss.classes, expected.size, cond, t);
        compare_rows("loss of a row", kCode<T>, got.rows, expected.rows, 1, expected.size, 1, real);
        double size = 0.0;
        for (const double s : expected.size) size = std::fmax(size, s);
        compare_rows("loss", kCode<T>, {got.mean}, {expected.mean}, 1, {size}, 1, real);
    }
}

}  // namespace

void check_losses() {
    for (const int64_t classes : {1, 2, 7, 64, 131, 2051}) {  // one, part of a vector, whole ones, several blocks
        const int64_t rows = 9;
        for (int kind = 0; kind < 8; ++kind) {
            Loss loss = batch(rows, classes);
            double cond = 1;
            if (kind & 1) {
                loss.shift = numbers(classes, -4, 0);
                loss.scale = numbers(classes, 0.5, 2);
                loss.weight = numbers(classes, 0.25, 3);
                if (classes > 2) {
                    loss.shift[0] = -INFINITY;  // a class that is masked, so not a label
                    for (int64_t& y : loss.target) y = y == 0 ? 1 : y;
                }
            }
            if (kind & 2) {
                loss.margin = numbers(classes, 0, 0.5);
                loss.row_scale = numbers(classes, 0.5, 3);
                loss.label_scale = numbers(classes, 0.5, 2);
                loss.sample_weight = numbers(rows, 0.5, 2);
                loss.focal = 1.5;
            }
            if (kind == 4) {
                loss.smoothing = numbers(classes, 0, 0.3);
                loss.weight = numbers(classes, 0.25, 3);
                cond = 8;  // label smoothing subtracts two numbers of one size
            }
            if (kind >= 5) {  // mixed labels: the label's own gradient is a sum of both signs
                loss.target_b = labels(rows, classes);
                if (!loss.shift.empty())
                    for (int64_t& y : loss.target_b) y = y == 0 && classes > 2 ? 1 : y;
                loss.lam = numbers(rows, 0, 1);
                cond = 8;
            }
            check_loss<float>(loss, cond);
            check_loss<double>(loss, cond);
            check_loss<bf16>(loss, cond);
            check_loss<f16>(loss, cond);
        }
    }
}

}  // namespace cpu_host
}  // namespace ltk
