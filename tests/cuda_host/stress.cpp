// Every kernel on small shapes with a host thread for each CUDA thread, for the sanitizers. Buffers are of exact size,
// one heap block each. Each call runs twice, the second time in place: losses must be equal to the bit.
#include "../../csrc/cuda/entry.cu"

namespace {

int calls = 0;

template <class T>
struct Buffer {
    std::unique_ptr<T[]> data;
    explicit Buffer(int64_t n) : data(new T[static_cast<size_t>(n)]) {}
    int64_t address() const { return static_cast<int64_t>(reinterpret_cast<uintptr_t>(data.get())); }
    T& operator[](int64_t i) const { return data[static_cast<size_t>(i)]; }
};

float value(int64_t i) {
    return static_cast<float>((i * 2654435761u >> 7) % 2001) / 200.0f - 5.0f;
}
void put(float* p, float x) {
    *p = x;
}
void put(bf16* p, float x) {
    p->bits = emulation::float_to_bf16(x);
}

template <class T>
void loss(int64_t dtype, int64_t rows, int64_t classes, Path path, bool mixed, Form form, Reduction reduction) {
    // Offset by one element: no row but the last of eight starts at a multiple of 16 bytes.
    Buffer<T> logits(rows * classes + 1), grad(rows * classes + 1);
    Buffer<int64_t> a(rows), b(rows), seed(1);
    Buffer<float> lam(rows), table(classes), curves(3 * classes), out(rows), again(rows);
    Buffer<double> scratch(adjusted_ce_cuda_scratch(rows, classes, 4));
    for (int64_t i = 0; i < rows * classes; ++i) put(&logits[i + 1], value(i));
    for (int64_t i = 0; i < rows; ++i) {
        a[i] = i == 1 ? -100 : i % classes;
        b[i] = (3 * i + 1) % classes;
        lam[i] = 0.25f;
        out[i] = again[i] = 0.0f;
    }
    for (int64_t j = 0; j < classes; ++j) {
        table[j] = curves[j] = 0.5f + value(j) * 0.05f;
        curves[classes + j] = 1.0f;
        curves[2 * classes + j] = 0.0f;
    }
    seed[0] = 12345;
    for (int pass = 0; pass < 2; ++pass) {
        const int64_t in = logits.address() + static_cast<int64_t>(sizeof(T));
        const int64_t to = pass == 0 ? grad.address() + static_cast<int64_t>(sizeof(T)) : in;
        LossCall call{};
        call.path = static_cast<int64_t>(path);
        call.dtype = dtype;
        call.logits = in;
        call.logits_stride = call.grad_stride = call.classes = classes;
        call.rows = rows;
        call.target = a.address();
        if (mixed) {
            call.target_b = b.address();
            call.lam = lam.address();
        }
        call.ignore_index = -100;
        if (form == Form::none) {
            call.shift = call.scale = call.margin = call.row_scale = table.address();
            call.label_scale = call.smoothing = table.address();
        }
        call.weight = table.address();
        call.focal_gamma = 1.5;
        call.label_smoothing = form == Form::sigmoid || form == Form::equalization ? 0.0 : 0.1;
        call.reduction = static_cast<int64_t>(reduction);
        call.loss = pass == 0 ? out.address() : again.address();
        call.grad = to;
        call.scratch = scratch.address();
        call.form = static_cast<int64_t>(form);
        call.form_table = form == Form::vmf ? curves.address() : table.address();
        call.form_seed = seed.address();
        call.option0 = call.option1 = 0.5;
        call.option2 = -4.0;
        if (form == Form::vmf) {
            call.option0 = 64.0;
            call.shift = table.address();
        }
        const char* error = ltk_cuda_adjusted_ce(&call);
        if (error != nullptr) emulation::fail(error);
        ++calls;
    }
    if (std::memcmp(&out[0], &again[0], sizeof(float) * static_cast<size_t>(rows)) != 0)
        emulation::fail("two calls, two losses");
    if (!(out[0] == out[0])) emulation::fail("the loss is NaN");
}

void two_phases(int64_t rows, int64_t classes) {
    Buffer<float> logits(rows * classes), table(classes);
    Buffer<double> sigma(rows), out(4 * rows);
    Buffer<int64_t> labels(rows);
    for (int64_t i = 0; i < rows * classes; ++i) logits[i] = value(i);
    for (int64_t j = 0; j < classes; ++j) table[j] = 1.0f;
    for (int64_t i = 0; i < rows; ++i) {
        labels[i] = i - 2;
        sigma[i] = 1.0;
    }
    const char* error =
        ltk_cuda_row_statistics(0, 0, 0, logits.address(), classes, rows, classes, labels.address(), table.address(),
                                table.address(), table.address(), sigma.address(), 1, out.address());
    if (error != nullptr) emulation::fail(error);
    error = ltk_cuda_gradient_from_statistics(0, 0, 0, logits.address(), classes, rows, classes, labels.address(),
                                              table.address(), table.address(), table.address(), sigma.address(),
                                              out.address(), logits.address(), classes);
    if (error != nullptr) emulation::fail(error);
    calls += 2;
}

// Every other row looks for its maxima, beside one in the same block that does not.
void contrast(int64_t rows, int64_t columns) {
    Buffer<float> dots(rows * columns), shift(columns);
    Buffer<double> one(rows), reference(rows), loss(rows);
    Buffer<int64_t> begin(rows), end(rows), absent(rows);
    for (int64_t i = 0; i < rows * columns; ++i) dots[i] = value(i) / 5.0f;
    for (int64_t j = 0; j < columns; ++j) shift[j] = 0.0f;
    for (int64_t i = 0; i < rows; ++i) {
        one[i] = 1.0;
        reference[i] = i % 2 == 0 ? 1.0 : INFINITY;
        absent[i] = i - 1;
        begin[i] = columns / 3;
        end[i] = columns / 2;
    }
    ContrastCall call{};
    call.dots = dots.address();
    call.stride = call.columns = columns;
    call.rows = rows;
    call.shift = shift.address();
    call.row_scale = call.weight = call.base = one.address();
    call.reference = reference.address();
    call.own_begin = begin.address();
    call.own_end = end.address();
    call.absent = absent.address();
    call.loss = loss.address();
    call.minus_own = call.coefficients = 1;
    const char* error = ltk_cuda_row_logsumexp(&call);
    if (error != nullptr) emulation::fail(error);
    if (!(loss[0] > 0.0)) emulation::fail("the loss of contrast is not above 0");
    ++calls;
}

// Probabilities, or a teacher's logits.
void soft_targets(int64_t rows, int64_t classes, bool teacher) {
    Buffer<float> logits(rows * classes), target(rows * classes), table(classes), coef(rows), loss(rows);
    Buffer<float> grad(rows * classes);
    for (int64_t i = 0; i < rows * classes; ++i) {
        logits[i] = value(i);
        target[i] = std::fabs(value(i + 1));
    }
    for (int64_t j = 0; j < classes; ++j) table[j] = 0.5f;
    for (int64_t i = 0; i < rows; ++i) coef[i] = 2.0f;
    SoftCall call{};
    call.teacher = teacher;
    call.logits = logits.address();
    call.target = target.address();
    call.logits_stride = call.target_stride = call.classes = classes;
    call.rows = rows;
    call.shift = call.scale = call.weight = table.address();
    call.row_coef = coef.address();
    call.row_loss = loss.address();
    call.grad = grad.address();
    call.sigma = call.keep = 0.5;
    const char* error = ltk_cuda_soft_targets(&call);
    if (error != nullptr) emulation::fail(error);
    if (!(loss[0] > 0.0f)) emulation::fail("the loss of soft targets is not above 0");
    ++calls;
}

template <class T>
void logdet(int64_t dtype, int64_t batch, int64_t n) {
    Buffer<T> matrices(batch * n * n), out(batch);
    for (int64_t i = 0; i < batch * n * n; ++i)
        matrices[i] = i % (n + 1) == i / (n * n) * n * n % (n + 1) ? T(2) : T(0);
    for (int64_t m = 0; m < batch; ++m)
        for (int64_t i = 0; i < n; ++i) matrices[(m * n + i) * n + i] = T(3);
    const char* error = ltk_cuda_logdet(0, 0, dtype, matrices.address(), batch, n, out.address());
    if (error != nullptr) emulation::fail(error);
    ++calls;
}

void scale(int64_t n) {
    Buffer<bf16> x(n);
    Buffer<float> factor(1);
    for (int64_t i = 0; i < n; ++i) put(&x[i], 1.0f);
    factor[0] = 0.5f;
    if (ltk_cuda_scale(0, 0, 2, x.address(), n, factor.address(), 0) != nullptr) emulation::fail("scale");
    ++calls;
}

}  // namespace

// "all", "some" or "few": one host thread a CUDA thread is slow, and what the classes change are the tails, which races
// do not see. "few" has every kernel with and without barriers of a block.
int main(int count, char** arguments) {
    const bool all = count == 1 || std::strcmp(arguments[1], "all") == 0;
    const bool few = !all && std::strcmp(arguments[1], "few") == 0;
    for (const Path path : {Path::registers, Path::cluster, Path::memory})
        for (const int64_t classes : {3, 40, 1100})
            for (const bool mixed : {false, true})
                for (const Form form : {Form::none, Form::seesaw, Form::equalization, Form::sigmoid, Form::vmf}) {
                    // One kernel, whatever the path.
                    const bool streams = form == Form::sigmoid || form == Form::vmf;
                    if (form == Form::vmf && mixed) continue;
                    if (!all && (classes == 3 || form == Form::equalization)) continue;
                    if (!all && (path == Path::cluster || mixed) && (classes == 1100) != (form == Form::none)) continue;
                    if (few &&
                        (streams ? path != Path::memory || mixed || classes == 40 : mixed == (form == Form::none)))
                        continue;
                    loss<float>(0, 2, classes, path, mixed, form, Reduction::mean);
                    if (all) loss<bf16>(2, 3, classes, path, mixed, form, Reduction::none);
                }
    two_phases(4, 37);
    two_phases(3, 1100);
    contrast(5, 40);
    contrast(3, 1100);
    soft_targets(5, 40, false);
    soft_targets(3, 1100, true);
    logdet<double>(1, 9, 5);
    logdet<float>(0, 2, 33);
    scale(1003);
    std::printf("%d calls agree\n", calls);
    return 0;
}
