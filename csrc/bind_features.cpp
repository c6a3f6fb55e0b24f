// Features: log-determinants, subsets and their greedy selection, clusters of equal size, nearest neighbours.
#include <pybind11/stl.h>

#include <vector>

#include "bind.h"
#include "cpu/balance.h"
#include "cpu/greedy.h"
#include "cpu/logdet.h"
#include "cpu/nearest.h"

namespace py = pybind11;

namespace ltk {

void bind_features(py::module_& m) {
    m.def("logdet_scratch", &ltk::logdet_scratch, "Doubles of scratch that one thread needs.");
    m.def(
        "logdet_batch",
        [](Address matrices, int64_t batch, int64_t n, Address scratch, Address out, int threads) {
            py::gil_scoped_release release;
            ltk::logdet_batch(pointer<const double>(matrices), batch, n, pointer<double>(scratch), pointer<double>(out),
                              threads);
        },
        "Log-determinants of `batch` SPD float64 n x n matrices.");
    m.def(
        "balance",
        [](Address cost, int64_t rows, int64_t clusters, int64_t stride, Address capacity, float epsilon, Address price,
           Address label, Address scratch, Address bid) {
            ltk::Balance job{pointer<const float>(cost),
                             rows,
                             clusters,
                             stride,
                             pointer<const int64_t>(capacity),
                             epsilon,
                             pointer<float>(price),
                             pointer<int64_t>(label),
                             pointer<int64_t>(scratch),
                             pointer<float>(bid)};
            py::gil_scoped_release release;
            ltk::balance(job);
        },
        "Near-minimal assignment of rows to clusters of fixed capacity.");
    py::class_<ltk::Nearest>(m, "Nearest", "The k largest scores of every row (csrc/cpu/nearest.h).")
        .def(py::init(
            [](int64_t rows, int64_t k, int64_t room, Address score, Address column, Address kept, Address least) {
                return ltk::Nearest{
                    rows, k, room, pointer(score), pointer<int64_t>(column), pointer<int64_t>(kept), pointer(least)};
            }))
        .def("add",
             [](const ltk::Nearest& job, bool single, Address scores, int64_t stride, int64_t columns, int64_t first,
                int threads) {
                 py::gil_scoped_release release;
                 ltk::nearest_add(job, single, pointer(scores), stride, columns, first, threads);
             })
        .def("sort", [](const ltk::Nearest& job, bool single, int threads) {
            py::gil_scoped_release release;
            ltk::nearest_sort(job, single, threads);
        });
    py::class_<ltk::Greedy>(m, "Greedy", "One greedy run: addresses, sizes and state (csrc/cpu/greedy.h).")
        .def(py::init([](int64_t d, int64_t subsets, int64_t groups, bool single, double alpha) {
            ltk::Greedy job{};
            job.d = d;
            job.subsets = subsets;
            job.groups = groups;
            job.single = single;
            job.alpha = alpha;
            return job;
        }))
        .def("pool",
             [](ltk::Greedy& job, Address rows, Address offsets, Address group_of, Address group_size,
                Address group_begin, Address group_packed, Address norms) {
                 job.rows = pointer<const double>(rows);
                 job.offsets = pointer<const int64_t>(offsets);
                 job.group_of = pointer<const int64_t>(group_of);
                 job.group_size = pointer<const int64_t>(group_size);
                 job.group_begin = pointer<const int64_t>(group_begin);
                 job.group_packed = pointer<const int64_t>(group_packed);
                 job.norms = pointer<const double>(norms);
             })
        .def("state",
             [](ltk::Greedy& job, Address ids, Address left, Address packs, Address scatter, Address mean, double count,
                double anchor, Address scratch) {
                 job.ids = pointer<int64_t>(ids);
                 job.left = pointer<int64_t>(left);
                 job.packs = pointer(packs);
                 job.scatter = pointer<double>(scatter);
                 job.mean = pointer<double>(mean);
                 job.count = count;
                 job.anchor = anchor;
                 job.scratch = pointer<double>(scratch);
             })
        .def("rule",
             [](ltk::Greedy& job, int mode, double q, double low, double high, double tie, double stop) {
                 job.mode = static_cast<ltk::Mode>(mode);
                 job.q = q;
                 job.low = low;
                 job.high = high;
                 job.tie = tie;
                 job.stop = stop;
             })
        .def("steps",
             [](ltk::Greedy& job, int64_t steps, Address picked, Address values) {
                 job.steps = steps;
                 job.picked = pointer<int64_t>(picked);
                 job.values = pointer<double>(values);
             })
        .def(
            "pack", [](const ltk::Greedy& job) { ltk::greedy_pack(job); }, py::call_guard<py::gil_scoped_release>())
        .def_readonly("count", &ltk::Greedy::count)
        .def_readonly("anchor", &ltk::Greedy::anchor)
        .def_readonly("done", &ltk::Greedy::done)
        .def_readonly("scored", &ltk::Greedy::scored)
        .def_readonly("decided", &ltk::Greedy::decided);
    m.def("greedy_scratch", &ltk::greedy_scratch, "Doubles of scratch for one run.");
    m.def("greedy_packed", &ltk::greedy_packed, "Elements of the packs of `count` subsets of one size.");
    m.def(
        "greedy_runs",
        [](const std::vector<ltk::Greedy*>& runs, int threads) {
            std::vector<ltk::Greedy> jobs;
            for (const ltk::Greedy* run : runs) jobs.push_back(*run);
            {
                py::gil_scoped_release release;
                ltk::greedy_runs(jobs.data(), static_cast<int64_t>(jobs.size()), threads);
            }
            for (size_t i = 0; i < jobs.size(); ++i) *runs[i] = jobs[i];
        },
        "The next steps of independent runs.");
}

}  // namespace ltk
