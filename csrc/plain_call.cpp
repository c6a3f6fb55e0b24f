#include "plain_call.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "cpu/adjusted_ce.h"
#include "cpu/kernels.h"

namespace ltk {
namespace {

// ---- DLPack 1.x (https://dmlc.github.io/dlpack), as far as it is read here ----

struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;
    uint64_t byte_offset;
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLInt = 0, kDLFloat = 2, kDLBfloat = 4;

struct DLPackExchangeAPI {
    struct {
        uint32_t major, minor;
    } version;
    void* previous;
    void* managed_tensor_allocator;
    void* managed_tensor_from_py_object;
    void* managed_tensor_to_py_object;
    int (*dltensor_from_py_object)(void* object, DLTensor* out);
    void* current_work_stream;
};

// ---- what `plain_setup` was told ----

constexpr const char* kTables[] = {"shift", "scale", "margin", "row_scale", "weight"};
constexpr int kTablesOfRecord = 5;
constexpr const char* kBeside[] = {"sample_weight", "smoothing", "label_scale"};  // (rows,), (classes,), (classes,)
constexpr int kBesideTables = 3;
constexpr Py_ssize_t kMostFields = 64;
constexpr int64_t kFewRows = 512;

struct Setup {
    int (*view)(void*, DLTensor*) = nullptr;
    PyObject *tensor = nullptr, *parameter = nullptr, *is_neg = nullptr;
    PyObject* defaults = nullptr;  // a record
    PyTypeObject* record = nullptr;
    PyObject* reductions = nullptr;
    PyObject *empty_like = nullptr, *number_f32 = nullptr, *number_f64 = nullptr;
    Py_ssize_t target = 0, tables = 0, beside = 0, grad_scale = 0, focal_gamma = 0, label_smoothing = 0,
               ignore_index = 0, reduction = 0;
    bool ours[kMostFields] = {};  // fields that this way serves; all others must have their default
};
Setup setup;

// ---- tensors ----

// The code of `DType`, or -1.
int dtype_code(const DLTensor& t) noexcept {
    if (t.dtype.lanes != 1) return -1;
    if (t.dtype.code == kDLBfloat) return t.dtype.bits == 16 ? static_cast<int>(DType::bf16) : -1;
    if (t.dtype.code != kDLFloat) return -1;
    switch (t.dtype.bits) {
        case 32:
            return static_cast<int>(DType::f32);
        case 64:
            return static_cast<int>(DType::f64);
        case 16:
            return static_cast<int>(DType::f16);
        default:
            return -1;
    }
}

template <class T = void>
T* address(const DLTensor& t) noexcept {
    return reinterpret_cast<T*>(static_cast<char*>(t.data) + t.byte_offset);
}

// A tensor on the CPU that is what it seems to be: no subclass, no view that stands for other numbers, with memory.
bool plain_tensor(PyObject* object, int ndim, DLTensor& out) noexcept {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    if (type != setup.tensor && type != setup.parameter) return false;
    if (setup.view(object, &out) != 0) {  // a layout or device that DLPack does not know
        PyErr_Clear();
        return false;
    }
    if (out.device.type != kDLCPU || out.ndim != ndim) return false;
    for (int i = 0; i < ndim; ++i)
        if (out.shape[i] == 0) return false;
    if (out.data == nullptr) return false;
    PyObject* negative = PyObject_CallMethodNoArgs(object, setup.is_neg);
    if (negative == nullptr) PyErr_Clear();
    const bool as_stored = negative == Py_False;
    Py_XDECREF(negative);
    return as_stored;
}

bool wrong_number(const char* name, Py_ssize_t expected, Py_ssize_t got) {
    if (got == expected) return false;
    PyErr_Format(PyExc_TypeError, "%s() takes %zd arguments, got %zd", name, expected, got);
    return true;
}

// Whether logits, target, the five tables and what is beside them are what the kernels take, as they are.
bool plain_tensors(PyObject* const* args, PyObject* const* beside) noexcept {
    DLTensor logits, target, table;
    if (setup.view == nullptr || !plain_tensor(args[0], 2, logits) || !plain_tensor(args[1], 1, target)) return false;
    const int dtype = dtype_code(logits);
    const int64_t rows = logits.shape[0], classes = logits.shape[1];
    if (dtype < 0 || (classes > 1 && logits.strides[1] != 1)) return false;
    if (target.dtype.code != kDLInt || target.dtype.bits != 64 || target.shape[0] != rows) return false;
    if (rows > 1 && target.strides[0] != 1) return false;
    const int real = static_cast<int>(dtype == static_cast<int>(DType::f64) ? DType::f64 : DType::f32);
    const auto fits = [&](PyObject* object, int64_t size) {
        return object == Py_None || (plain_tensor(object, 1, table) && dtype_code(table) == real &&
                                     table.shape[0] == size && (size <= 1 || table.strides[0] == 1));
    };
    for (int t = 0; t < kTablesOfRecord; ++t)
        if (!fits(args[2 + t], classes)) return false;
    for (int t = 0; t < kBesideTables; ++t)
        if (!fits(beside[t], t == 0 ? rows : classes)) return false;
    return true;
}

// plain_call(logits, target, shift, scale, margin, row_scale, weight, focal_gamma, label_smoothing, ignore_index,
// reduction, sample_weight, label_scale): the record of a call that needs no further look, or None. label_smoothing is
// a number or a table.
PyObject* plain_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_number("plain_call", 2 + kTablesOfRecord + 6, count)) return nullptr;
    PyObject *gamma = args[7], *smoothing = args[8], *ignored = args[9], *reduction = args[10];
    PyObject* beside[kBesideTables] = {args[11], Py_None, args[12]};
    if (setup.view == nullptr || smoothing == Py_None) Py_RETURN_NONE;
    if (!PyFloat_CheckExact(smoothing)) {
        beside[1] = smoothing;
        smoothing = PyTuple_GET_ITEM(setup.defaults, setup.label_smoothing);
    }
    if (!PyFloat_CheckExact(gamma) || !PyFloat_CheckExact(smoothing) || !PyLong_CheckExact(ignored) ||
        !PyUnicode_CheckExact(reduction))
        Py_RETURN_NONE;
    int overflow = 0;
    PyLong_AsLongLongAndOverflow(ignored, &overflow);
    if (overflow != 0) Py_RETURN_NONE;
    const double g = PyFloat_AS_DOUBLE(gamma), s = PyFloat_AS_DOUBLE(smoothing);
    if (!(g >= 0.0 && g < 1e30 && s >= 0.0 && s <= 1.0) || !plain_tensors(args, beside)) Py_RETURN_NONE;
    PyObject* code = PyDict_GetItemWithError(setup.reductions, reduction);
    if (code == nullptr) {
        if (PyErr_Occurred() != nullptr) return nullptr;
        Py_RETURN_NONE;
    }
    // As tuple.__new__ makes a subclass' instances.
    PyObject* call = setup.record->tp_alloc(setup.record, PyTuple_GET_SIZE(setup.defaults));
    if (call == nullptr) return nullptr;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(setup.defaults); ++i) {
        PyObject* value = PyTuple_GET_ITEM(setup.defaults, i);
        if (i == setup.target) value = args[1];
        if (i >= setup.tables && i < setup.tables + kTablesOfRecord) value = args[2 + i - setup.tables];
        if (i >= setup.beside && i < setup.beside + kBesideTables) value = beside[i - setup.beside];
        if (i == setup.focal_gamma) value = gamma;
        if (i == setup.label_smoothing) value = smoothing;
        if (i == setup.ignore_index) value = ignored;
        if (i == setup.reduction) value = code;
        PyTuple_SET_ITEM(call, i, Py_NewRef(value));
    }
    return call;
}

// The tensor's view; false with a Python error where it has elements but no memory, or cannot be looked at.
bool viewed(PyObject* object, const char* name, DLTensor& out) {
    if (setup.view(object, &out) != 0) return false;
    if (out.data != nullptr) return true;
    PyObject* shape = PyTuple_New(out.ndim);
    for (int32_t i = 0; i < out.ndim; ++i) {
        if (out.shape[i] == 0) return Py_XDECREF(shape), true;
        if (shape != nullptr) PyTuple_SET_ITEM(shape, i, PyLong_FromLongLong(out.shape[i]));
    }
    PyErr_Format(PyExc_RuntimeError, "%s is %s of shape %S without memory to read", name, Py_TYPE(object)->tp_name,
                 shape);
    Py_XDECREF(shape);
    return false;
}

// Whether every field of the record that this way does not serve holds its default.
bool served(PyObject* call) noexcept {
    if (setup.view == nullptr || PyTuple_GET_SIZE(call) != PyTuple_GET_SIZE(setup.defaults)) return false;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(call); ++i)
        if (!setup.ours[i] && PyTuple_GET_ITEM(call, i) != PyTuple_GET_ITEM(setup.defaults, i)) return false;
    return true;
}

// The kernel's job of a call, all but where its results go.
struct Job {
    AdjustedCe kernel{};
    int dtype = 0;
    Reduction reduction{};
    bool consecutive = false;  // the logits lie without gaps, as a gradient made like them will
    bool scaled = false;       // every row's gradient has the factor `scale`
    double scale = 1.0;
    bool strange = false;  // the factor is another than this way reads
};

// False with a Python error set.
bool read_call(PyObject* logits, PyObject* call, Job& job) {
    const Setup& s = setup;
    DLTensor t;
    if (!viewed(logits, "logits", t)) return false;
    job.dtype = dtype_code(t);
    job.kernel.logits = address(t);
    job.kernel.rows = t.shape[0];
    job.kernel.classes = t.shape[1];
    job.kernel.logits_stride = t.strides[0];
    job.consecutive = (t.shape[1] <= 1 || t.strides[1] == 1) && (t.shape[0] <= 1 || t.strides[0] == t.shape[1]);
    if (!viewed(PyTuple_GET_ITEM(call, s.target), "target", t)) return false;
    job.kernel.target = address<const int64_t>(t);
    const void** tables[kTablesOfRecord] = {&job.kernel.shift, &job.kernel.scale, &job.kernel.margin,
                                            &job.kernel.row_scale, &job.kernel.weight};
    for (int i = 0; i < kTablesOfRecord; ++i) {
        PyObject* table = PyTuple_GET_ITEM(call, s.tables + i);
        if (table == Py_None) continue;
        if (!viewed(table, kTables[i], t)) return false;
        *tables[i] = address(t);
    }
    const void** beside[kBesideTables] = {&job.kernel.sample_weight, &job.kernel.smoothing, &job.kernel.label_scale};
    for (int i = 0; i < kBesideTables; ++i) {
        PyObject* table = PyTuple_GET_ITEM(call, s.beside + i);
        if (table == Py_None) continue;
        if (!viewed(table, kBeside[i], t)) return false;
        *beside[i] = address(t);
    }
    PyObject* factor = PyTuple_GET_ITEM(call, s.grad_scale);
    if (factor != Py_None) {
        if (!viewed(factor, "grad_scale", t)) return false;
        const bool wide = job.dtype == static_cast<int>(DType::f64);
        job.strange = t.ndim != 0 || dtype_code(t) != static_cast<int>(wide ? DType::f64 : DType::f32);
        job.scaled = !job.strange;
        if (job.scaled) job.scale = wide ? *address<const double>(t) : static_cast<double>(*address<const float>(t));
    }
    job.kernel.focal_gamma = PyFloat_AsDouble(PyTuple_GET_ITEM(call, s.focal_gamma));
    job.kernel.label_smoothing = PyFloat_AsDouble(PyTuple_GET_ITEM(call, s.label_smoothing));
    job.kernel.ignore_index = PyLong_AsLongLong(PyTuple_GET_ITEM(call, s.ignore_index));
    job.reduction = static_cast<Reduction>(PyLong_AsLong(PyTuple_GET_ITEM(call, s.reduction)));
    return PyErr_Occurred() == nullptr;
}

// Runs the kernel. False with a Python error set; else `status` is that of `adjusted_ce`.
bool run(Job& job, PyObject* loss, PyObject* grad, PyObject* thread_count, int64_t& status) {
    DLTensor t;
    if (!viewed(loss, "loss", t)) return false;
    void* const to = address(t);
    if (grad != Py_None) {
        if (!viewed(grad, "grad", t)) return false;
        job.kernel.grad = address(t);
        job.kernel.grad_stride = t.strides[0];
    }
    const int threads = static_cast<int>(PyLong_AsLong(thread_count));
    if (PyErr_Occurred() != nullptr) return false;
    if (job.reduction == Reduction::none) job.kernel.row_loss = to;

    // The threads' scratch, then the row losses where the caller does not want them, then the rows' factors; small
    // calls live on the stack, but for the factors the kernel's own.
    const int64_t scratch = threads * adjusted_ce_scratch(job.kernel.classes), rows = job.kernel.rows;
    const int64_t reals = scratch + (job.scaled ? 2 : 1) * rows;
    double few[kFewRows];
    void* factors = few;
    std::unique_ptr<void, void (*)(void*)> memory(nullptr, std::free);
    if (reals > kStack || (job.scaled && rows > kFewRows)) {
        const size_t size = job.dtype == static_cast<int>(DType::f64) ? 8 : 4;
        memory.reset(std::aligned_alloc(64, (static_cast<size_t>(reals) * size + 63) / 64 * 64));
        if (memory == nullptr) {
            PyErr_NoMemory();
            return false;
        }
        if (job.kernel.row_loss == nullptr)
            job.kernel.row_loss = static_cast<char*>(memory.get()) + static_cast<size_t>(scratch) * size;
        factors = static_cast<char*>(memory.get()) + static_cast<size_t>(scratch + rows) * size;
    }
    if (job.scaled && job.kernel.grad != nullptr) {
        if (job.dtype == static_cast<int>(DType::f64))
            std::fill_n(static_cast<double*>(factors), rows, job.scale);
        else
            std::fill_n(static_cast<float*>(factors), rows, static_cast<float>(job.scale));
        job.kernel.row_coef = factors;
    }
    Py_BEGIN_ALLOW_THREADS;
    status = adjusted_ce(job.kernel, job.dtype, job.reduction, to, memory.get(), threads);
    Py_END_ALLOW_THREADS;
    return true;
}

// plain_run(logits, call, loss, grad or None, threads): fills loss and grad for a call whose tensors were found plain.
// The status of `adjusted_ce`; None where the record holds something that this way does not serve.
PyObject* plain_run(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_number("plain_run", 5, count)) return nullptr;
    if (!served(args[1])) Py_RETURN_NONE;
    Job job;
    int64_t status = -1;
    if (!read_call(args[0], args[1], job)) return nullptr;
    if (job.strange) Py_RETURN_NONE;
    if (!run(job, args[2], args[3], args[4], status)) return nullptr;
    return PyLong_FromLongLong(status);
}

// plain_loss(logits, call, need_grad, threads): the same with a loss and, where it is needed, a gradient made for it:
// (loss, grad or None). The status alone where it is not -1; None where this way does not serve.
PyObject* plain_loss(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_number("plain_loss", 4, count)) return nullptr;
    if (!served(args[1])) Py_RETURN_NONE;
    Job job;
    if (!read_call(args[0], args[1], job)) return nullptr;
    if (job.reduction == Reduction::none || !job.consecutive || job.strange) Py_RETURN_NONE;
    PyObject* number = job.dtype == static_cast<int>(DType::f64) ? setup.number_f64 : setup.number_f32;
    // Like something there is: torch.empty takes twice the time, for reading its arguments.
    PyObject* loss = PyObject_CallOneArg(setup.empty_like, number);
    if (loss == nullptr) return nullptr;
    PyObject* grad = args[2] == Py_True ? PyObject_CallOneArg(setup.empty_like, args[0]) : Py_NewRef(Py_None);
    int64_t status = -1;
    PyObject* found = nullptr;
    if (grad != nullptr && run(job, loss, grad, args[3], status))
        found = status == -1 ? PyTuple_Pack(2, loss, grad) : PyLong_FromLongLong(status);
    Py_DECREF(loss);
    Py_XDECREF(grad);
    return found;
}

// plain_setup(capsule, Tensor, Parameter, record, reductions, empty_like, number_f32, number_f64): the exchange table
// of torch.Tensor; a record that holds what fields hold when nothing is said; the codes of the reductions; numbers ()
// for `empty_like`. Returns whether the short way is open.
PyObject* plain_setup(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (wrong_number("plain_setup", 8, count)) return nullptr;
    Setup found;
    PyObject *defaults = args[3], *reductions = args[4];
    if (!PyTuple_Check(defaults) || PyTuple_GET_SIZE(defaults) > kMostFields || !PyDict_Check(reductions)) {
        PyErr_SetString(PyExc_TypeError, "plain_setup: the record must be a named tuple, the reductions a dict");
        return nullptr;
    }
    PyObject* fields = PyObject_GetAttrString(defaults, "_fields");  // kept: the process has one record
    if (fields == nullptr) return nullptr;
    const auto* table = static_cast<const DLPackExchangeAPI*>(PyCapsule_GetPointer(args[0], "dlpack_exchange_api"));
    if (table == nullptr) return nullptr;
    if (table->version.major != 1 || table->dltensor_from_py_object == nullptr) Py_RETURN_FALSE;

    bool missing = false;
    const auto index = [&](const char* name) {
        for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(fields); ++i) {
            if (PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(fields, i), name) != 0) continue;
            found.ours[i] = true;
            return i;
        }
        missing = true;
        PyErr_Format(PyExc_TypeError, "plain_setup: the record has no field %s", name);
        return Py_ssize_t{0};
    };
    found.target = index("target");
    found.tables = index(kTables[0]);
    for (int i = 1; i < kTablesOfRecord; ++i)
        if (index(kTables[i]) != found.tables + i) missing = true;
    found.beside = index(kBeside[0]);
    for (int i = 1; i < kBesideTables; ++i)
        if (index(kBeside[i]) != found.beside + i) missing = true;
    found.grad_scale = index("grad_scale");
    found.focal_gamma = index("focal_gamma");
    found.label_smoothing = index("label_smoothing");
    found.ignore_index = index("ignore_index");
    found.reduction = index("reduction");
    if (missing) {
        if (PyErr_Occurred() == nullptr) PyErr_SetString(PyExc_TypeError, "plain_setup: the tables are not in order");
        return nullptr;
    }
    found.is_neg = PyUnicode_InternFromString("is_neg");
    if (found.is_neg == nullptr) return nullptr;
    found.tensor = Py_NewRef(args[1]);
    found.parameter = Py_NewRef(args[2]);
    found.defaults = Py_NewRef(defaults);
    found.record = Py_TYPE(defaults);
    found.reductions = Py_NewRef(reductions);
    found.empty_like = Py_NewRef(args[5]);
    found.number_f32 = Py_NewRef(args[6]);
    found.number_f64 = Py_NewRef(args[7]);
    found.view = table->dltensor_from_py_object;
    setup = found;  // what was there stays referenced: calls may be reading it
    Py_RETURN_TRUE;
}

}  // namespace

bool add_plain_call(PyObject* module) {
    static PyMethodDef methods[] = {
        {"plain_setup", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_setup)), METH_FASTCALL,
         "Opens the short way of a call; see csrc/plain_call.h."},
        {"plain_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_call)), METH_FASTCALL,
         "The record of a call that needs no further look; None where it does."},
        {"plain_run", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_run)), METH_FASTCALL,
         "Loss and gradient of a plain call; None where it is not one."},
        {"plain_loss", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&plain_loss)), METH_FASTCALL,
         "The same with tensors made for them."},
        {nullptr, nullptr, 0, nullptr}};
    return PyModule_AddFunctions(module, methods) == 0;
}

}  // namespace ltk
