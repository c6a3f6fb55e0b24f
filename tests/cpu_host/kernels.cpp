// Promise: on a processor without a row of its own in isa.def the kernels compute what they promise. Float64 written
// plainly is the judge of exp, of the loss with its tables and of the log-determinants; where x86 has its tests of the
// formula already (closed forms, soft targets, experts, sigmoid losses, two-phase and contrastive rows, selection), the
// kernel's own float64 way is, on the same rounded numbers. No Python: .ci/aarch64 runs this under emulation.
#include "host.h"

#include "experts.h"
#include "isa.h"
#include "nearest.h"
#include "row_logsumexp.h"
#include "row_statistics.h"
#include "sigmoid_ce.h"
#include "sinkhorn.h"
#include "soft_targets.h"
#include "subset_scores.h"

namespace ltk {
namespace cpu_host {
namespace {

// ---- float32 and 16 bits against the same kernel's float64 ----

// Of experts and teachers a gradient is the difference of two, either of which may be as large as any of the batch.
template <class T, class Run>
void against_double(const char* what, double size, Run run) {
    const Numbers got = run(T{}), expected = run(double{});
    const int64_t all = static_cast<int64_t>(expected.size());
    compare_rows(what, kCode<T>, got, expected, all, {size}, 8, kTolerances[kCode<T>]);
}
template <class Run>
void each_type(const char* what, double size, Run run) {
    against_double<float>(what, size, run);
    against_double<bf16>(what, size, run);
    against_double<f16>(what, size, run);
}

// What 16 bits can hold exactly, so that every type is given the same numbers.
Numbers exact(int64_t n, double low, double high) {
    Numbers out = rounded<bf16>(numbers(n, low, high));
    for (double& x : out) x = std::rint(x * 64.0) / 64.0;
    return rounded<bf16>(out);
}

void check_closed_forms(int64_t classes) {
    const double m = 0.3;
    for (const Form form : {Form::seesaw, Form::equalization, Form::arcface, Form::sigmoid, Form::cloud}) {
        Loss loss = batch(8, classes);
        const bool cosines = form == Form::arcface;
        loss.logits = exact(8 * classes, cosines ? -0.9 : -6, cosines ? 0.9 : 6);
        loss.form.form = form;
        if (form == Form::seesaw) loss.form_table = numbers(classes, 0, 8);
        if (form == Form::cloud) loss.form_table = numbers(classes, 0, 1);
        if (form == Form::equalization)
            for (int64_t j = 0; j < classes; ++j) loss.form_table.push_back(j % 2 == 0 ? 1.0 : 0.0);
        const double options[5][3] = {
            {0.8, 2.0, std::log(1e-2)}, {0.7, 0, 0}, {std::cos(m), std::sin(m), 0}, {0, 0, 0}, {0, 0, 0}};
        for (int k = 0; k < 3; ++k) loss.form.options[k] = options[static_cast<int>(form) - 1][k];
        if (cosines) loss.row_scale = Numbers(static_cast<size_t>(classes), 16.0);
        each_type("closed form", 40, [&](auto t) { return by_kernel<decltype(t)>(loss, 1).grad; });
    }
}

void check_soft_targets(int64_t classes) {
    const int64_t rows = 6;
    const Numbers logits = exact(rows * classes, -6, 6), other = exact(rows * classes, -4, 4);
    const Numbers shift = numbers(classes, -3, 0), scale = numbers(classes, 0.5, 2), weight = numbers(classes, 0.25, 3);
    Numbers q = exact(rows * classes, 0, 1);
    for (const bool teacher : {false, true}) {
        each_type("soft targets", 20, [&](auto t) {
            using T = decltype(t);
            using Real = RealOf<T>;
            auto z = as<T>(logits), target = as<T>(teacher ? other : q);
            auto a = as<Real>(shift), b = as<Real>(scale), w = as<Real>(weight);
            std::vector<Real> grad(z.size()), row_loss(static_cast<size_t>(rows));
            std::vector<double> scratch(static_cast<size_t>(adjusted_ce_scratch(classes)));
            SoftTargets job{};
            job.logits = z.data();
            job.target = target.data();
            job.logits_stride = job.target_stride = job.classes = classes;
            job.teacher = teacher;
            job.shift = a.data();
            job.scale = b.data();
            if (!teacher) job.weight = w.data();
            job.sigma = teacher ? 0.5 : 1.0;
            job.keep = 0.9;
            job.floor = 0.1 / static_cast<double>(classes);
            job.factor = 1.0;
            job.grad_scale = 1.0 / static_cast<double>(rows);
            job.rows = rows;
            job.row_loss = row_loss.data();
            job.grad = grad.data();
            if (soft_targets(job, kCode<T>, Reduction::none, nullptr, scratch.data(), 1) != -1) ++wrong;
            return back(grad);
        });
    }
}

void check_sigmoid(int64_t classes) {
    const int64_t rows = 6;
    const Numbers logits = exact(rows * classes, -6, 6);
    const Numbers negative = numbers(classes, 0.2, 1), shift = numbers(classes, -2, 0);
    std::vector<uint8_t> hot;
    for (const int64_t y : labels(rows * classes, 3)) hot.push_back(y == 0);
    each_type("sigmoid", 20, [&](auto t) {
        using T = decltype(t);
        using Real = RealOf<T>;
        auto z = as<T>(logits);
        auto n = as<Real>(negative), d = as<Real>(shift);
        std::vector<Real> grad(z.size()), row_loss(static_cast<size_t>(rows));
        SigmoidCe job{};
        job.logits = z.data();
        job.logits_stride = job.hot_stride = job.classes = classes;
        job.rows = rows;
        job.hot = hot.data();
        job.hot_type = Hot::u8;
        job.ignore_index = -100;
        job.tables.negative = n.data();
        job.tables.shift = d.data();
        job.tables.negative_scale = 2.0;
        job.tables.focal_gamma = 1.5;
        job.row_loss = row_loss.data();
        job.grad = grad.data();
        Real loss = 0;
        if (sigmoid_ce(job, kCode<T>, static_cast<int>(Reduction::mean), 1.0, &loss, 1) != -1) ++wrong;
        Numbers out = back(grad);
        out.push_back(static_cast<double>(loss));
        return out;
    });
}

void check_experts(int64_t classes) {
    const int64_t rows = 5;
    const Numbers first = exact(rows * classes, -6, 6), second = exact(rows * classes, -6, 6);
    const Numbers shift = numbers(classes, -3, 0), ones(static_cast<size_t>(classes), 1.0);
    const Labels target = labels(rows, classes);
    for (const Coupling coupling : {Coupling::mean_kl, Coupling::mutual_kl}) {
        each_type("experts", 20, [&](auto t) {
            using T = decltype(t);
            using Real = RealOf<T>;
            std::vector<T> z[2] = {as<T>(first), as<T>(second)};
            auto a = as<Real>(shift), b = as<Real>(ones);
            std::vector<Real> grad[2], row_loss(static_cast<size_t>(3 * rows));
            Experts job{};
            for (size_t e = 0; e < 2; ++e) {
                grad[e].resize(z[e].size());
                AdjustedCe& own = job.expert[e];
                own.logits = z[e].data();
                own.logits_stride = own.grad_stride = own.classes = classes;
                own.rows = rows;
                own.target = target.data();
                own.ignore_index = -100;
                if (e == 1) own.shift = a.data(), own.scale = b.data();
                own.grad = grad[e].data();
            }
            job.joint = job.expert[0];
            job.joint.grad = nullptr;
            job.experts = 2;
            job.coupling = coupling;
            job.sigma = 0.7;
            for (int e = 0; e < 3; ++e) job.factor[e] = 0.5;
            job.row_loss = row_loss.data();
            std::vector<double> scratch(static_cast<size_t>(experts_scratch(2, classes)));
            Real loss = 0;
            if (experts_ce(job, kCode<T>, Reduction::mean, &loss, scratch.data(), 1) != -1) ++wrong;
            Numbers out = back(grad[0]);
            for (const Real g : grad[1]) out.push_back(static_cast<double>(g));
            return out;
        });
    }
}

void check_two_phases(int64_t classes) {
    const int64_t rows = 6;
    const Numbers logits = exact(rows * classes, -6, 6), sigma(static_cast<size_t>(rows), 1.5);
    const Numbers shift = numbers(classes, -3, 0), scale = numbers(classes, 0.5, 2);
    Labels target = labels(rows, classes);
    target[0] = -1;  // elsewhere
    each_type("two phases", 25, [&](auto t) {
        using T = decltype(t);
        using Real = RealOf<T>;
        auto z = as<T>(logits);
        auto a = as<Real>(shift), b = as<Real>(scale);
        ClassPart part{};
        part.logits = z.data();
        part.logits_stride = part.classes = classes;
        part.target = target.data();
        part.shift = a.data();
        part.scale = b.data();
        part.row_scale = sigma.data();
        part.rows = rows;
        std::vector<double> found(static_cast<size_t>(rows * kStatistics));
        std::vector<double> terms(static_cast<size_t>(rows * kGradientTerms), 0.0);
        row_statistics(part, kCode<T>, false, found.data(), 1);
        Numbers sums;
        for (size_t i = 0; i < static_cast<size_t>(rows); ++i) {
            const double* row = &found[i * kStatistics];
            const double total = std::log(row[1] + std::exp(row[2] - row[0])) + row[0];
            sums.push_back(total);
            terms[i * kGradientTerms] = row[0];
            terms[i * kGradientTerms + 1] = 1.5 / static_cast<double>(rows) * std::exp(row[0] - total);
            terms[i * kGradientTerms + 3] = -0.25;
        }
        std::vector<T> grad(z.size());
        gradient_from_statistics(part, kCode<T>, terms.data(), grad.data(), classes, 1);
        Numbers out = back(grad);
        out.insert(out.end(), sums.begin(), sums.end());
        return out;
    });
}

void check_contrast() {
    const int64_t rows = 7, columns = 133;
    const Numbers dots = numbers(rows * columns, -1, 1), scale(static_cast<size_t>(rows), 10.0);
    Labels begin, end;
    for (int64_t i = 0; i < rows; ++i) begin.push_back(3 * i), end.push_back(3 * i + 19);
    const Numbers ones(static_cast<size_t>(rows), 1.0);
    for (const bool coefficients : {false, true}) {
        against_double<float>("contrast", 12, [&](auto t) {
            using T = decltype(t);
            auto d = as<T>(dots);
            Numbers other(static_cast<size_t>(rows)), own(static_cast<size_t>(rows));
            RowLogsumexp job{};
            job.dots = d.data();
            job.stride = job.columns = columns;
            job.rows = rows;
            job.row_scale = scale.data();
            job.own_begin = begin.data();
            job.own_end = end.data();
            job.other = other.data();
            job.own = own.data();
            job.grad_other = job.grad_own = ones.data();
            job.coefficients = coefficients;
            row_logsumexp(job, kCode<T>, 1);
            if (coefficients) return back(d);
            other.insert(other.end(), own.begin(), own.end());
            return other;
        });
    }
}

// ---- selection ----

void check_selection() {
    for (const int64_t n : {1, 5, 16}) {
        const int64_t count = 11;
        Numbers matrices, out(static_cast<size_t>(count));
        for (int64_t m = 0; m < count; ++m) {
            const Numbers x = numbers(n * n, -1, 1);
            for (int64_t i = 0; i < n; ++i)
                for (int64_t j = 0; j < n; ++j) {
                    double sum = i == j ? 1.0 : 0.0;
                    for (int64_t k = 0; k < n; ++k)
                        sum += x[static_cast<size_t>(i * n + k)] * x[static_cast<size_t>(j * n + k)];
                    matrices.push_back(sum);
                }
        }
        Numbers scratch(static_cast<size_t>(logdet_scratch(n)));
        logdet_batch(matrices.data(), count, n, scratch.data(), out.data(), 1);
        for (int64_t m = 0; m < count; ++m) {  // by Gauss, without pivots: the matrices are positive definite
            Numbers a(matrices.begin() + m * n * n, matrices.begin() + (m + 1) * n * n);
            const auto at = [&](int64_t i, int64_t j) -> double& { return a[static_cast<size_t>(i * n + j)]; };
            double expected = 0.0;
            for (int64_t k = 0; k < n; ++k) {
                expected += std::log(at(k, k));
                for (int64_t i = k + 1; i < n; ++i)
                    for (int64_t j = n - 1; j >= k; --j) at(i, j) -= at(i, k) / at(k, k) * at(k, j);
            }
            within("logdet", 1, out[static_cast<size_t>(m)], expected, 1e-12 * (1.0 + std::abs(expected)));
        }
    }

    const int64_t rows = 4, columns = 301, k = 5, room = 64;
    const Numbers scores = exact(rows * columns, -1, 1);  // with ties
    auto single = as<float>(scores);
    std::vector<float> score(static_cast<size_t>(rows * room)), least(static_cast<size_t>(rows));
    Labels column(static_cast<size_t>(rows * room)), kept(static_cast<size_t>(rows), 0);
    const Nearest job{rows, k, room, score.data(), column.data(), kept.data(), least.data()};
    nearest_add(job, true, single.data(), columns, columns, 0, 1);
    nearest_sort(job, true, 1);
    for (int64_t i = 0; i < rows; ++i) {
        std::vector<bool> taken(static_cast<size_t>(columns));
        for (int64_t place = 0; place < k; ++place) {
            int64_t best = -1;
            for (int64_t j = 0; j < columns; ++j)
                if (!taken[static_cast<size_t>(j)] && (best < 0 || scores[static_cast<size_t>(i * columns + j)] >
                                                                       scores[static_cast<size_t>(i * columns + best)]))
                    best = j;
            taken[static_cast<size_t>(best)] = true;
            within("nearest", 0, static_cast<double>(column[static_cast<size_t>(i * room + place)]),
                   static_cast<double>(best), 0.0);
        }
    }

    const int64_t d = 9, size = 4;
    const Numbers values = numbers(d * size, -1, 1), centre(static_cast<size_t>(d), 0.125);
    Numbers basis(static_cast<size_t>(d * d), 0.0);
    for (int64_t i = 0; i < d; ++i) basis[static_cast<size_t>(i * d + i)] = 0.5 + 0.125 * static_cast<double>(i);
    against_double<float>("subset scores", 10, [&](auto t) {
        using Real = decltype(t);
        constexpr int64_t lanes = kLanes<Real>;
        std::vector<Real> pool, b = as<Real>(basis), c = as<Real>(centre);
        for (int64_t e = 0; e < d * size; ++e)
            for (int64_t lane = 0; lane < lanes; ++lane)
                pool.push_back(
                    static_cast<Real>(values[static_cast<size_t>(e)] + 0.0625 * static_cast<double>(lane % 8)));
        const int64_t start = 0, samples = size, group = 0;
        std::vector<double> out(static_cast<size_t>(lanes));
        std::vector<Real> scratch(static_cast<size_t>(subset_scores_scratch(d, size)));
        subset_scores(SubsetScores<Real>{pool.data(), &start, &samples, &group, 1, d, b.data(), c.data(), 20.0,
                                         out.data(), nullptr},
                      scratch.data(), 1);
        return Numbers(out.begin(), out.begin() + 8);
    });

    const int64_t people = 24, classes = 7;
    const Numbers similar = numbers(people * classes, -1, 1), prior(static_cast<size_t>(classes), 1.0 / 7.0);
    against_double<float>("sinkhorn", 40, [&](auto t) {
        using Real = decltype(t);
        auto s = as<Real>(similar);
        std::vector<Real> out(s.size()), shift(static_cast<size_t>(classes));
        Numbers potential(static_cast<size_t>(classes)), sums(static_cast<size_t>(classes));
        Sinkhorn transport{s.data(), classes,    people,           classes,      prior.data(), 20.0, 0.0,
                           12,       out.data(), potential.data(), shift.data(), sums.data(),  0.0,  0};
        sinkhorn(transport, std::is_same_v<Real, float>);
        return back(out);
    });
}

}  // namespace
}  // namespace cpu_host
}  // namespace ltk

int main() {
    using namespace ltk::cpu_host;
    const char* error = nullptr;
    if (ltk::choose_isa(&error) == nullptr) return std::printf("%s\n", error), 1;
    check_exp();
    check_losses();
    for (const int64_t classes : {2, 7, 64, 131}) {
        check_closed_forms(classes);
        check_soft_targets(classes);
        check_sigmoid(classes);
        check_experts(classes);
        check_two_phases(classes);
    }
    check_contrast();
    check_selection();
    std::printf("%s: %lld numbers compared, %lld of them unlike 0, %lld wrong\n", ltk::active_isa().name,
                static_cast<long long>(compared), static_cast<long long>(telling), static_cast<long long>(wrong));
    if (telling * 3 < compared * 2) return std::printf("the tolerances would accept zeros\n"), 1;
    return wrong != 0;
}
