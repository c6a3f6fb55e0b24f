// Which instruction sets this build holds, which this processor runs, and which one is active.
#pragma once
#include "kernels.h"

namespace ltk {

struct IsaRow {
    const char* name;
    bool supported;          // by this processor
    const Kernels* kernels;  // nullptr where this build holds no code for it
};

// All rows of isa.def, slowest first, and how many there are.
const IsaRow* isa_rows(int* count) noexcept;

// The active row: LTKERNELS_ISA when it is set, else the last supported one. Returns nullptr, with the reason in
// *error, when LTKERNELS_ISA names an unknown or unsupported one: falling back silently would time the wrong code.
const IsaRow* choose_isa(const char** error) noexcept;

// The active row and its kernels; valid after choose_isa() has succeeded. The module's import calls it, and nobody
// later: kernels of other threads may be reading what it writes.
const IsaRow& active_isa() noexcept;
const Kernels& kernels() noexcept;

}  // namespace ltk
