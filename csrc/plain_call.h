// The short way of a call: what Python would ask each tensor for, attribute by attribute, is read through DLPack's
// exchange table (version 1 of its C ABI, which torch offers since 2.10), and the record is read as the tuple that it
// is. Of a loss of 128 x 10 on the long way, nine tenths of the time are such questions. Where torch has no table every
// call goes the long way.
#pragma once
#include <Python.h>

namespace ltk {

// Adds plain_setup, plain_call, plain_run and plain_loss to the module; false with a Python error set.
bool add_plain_call(PyObject* module);

}  // namespace ltk
