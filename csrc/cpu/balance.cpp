#include "balance.h"

#include "isa.h"

namespace ltk {

void balance(const Balance& job) noexcept {
    kernels().balance_f32(job);
}

}  // namespace ltk
