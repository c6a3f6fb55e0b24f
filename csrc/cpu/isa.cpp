#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace ltk {

#if defined(LTK_HAVE_BASELINE)
namespace baseline {
extern const Kernels kernels;
}
#endif
#if defined(LTK_HAVE_AVX2)
namespace avx2 {
extern const Kernels kernels;
}
#endif
#if defined(LTK_HAVE_AVX512)
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

constexpr const Kernels* kNone = nullptr;
#if defined(LTK_HAVE_BASELINE)
constexpr const Kernels* table_baseline = &baseline::kernels;
#else
constexpr const Kernels* table_baseline = kNone;
#endif
#if defined(LTK_HAVE_AVX2)
constexpr const Kernels* table_avx2 = &avx2::kernels;
#else
constexpr const Kernels* table_avx2 = kNone;
#endif
#if defined(LTK_HAVE_AVX512)
constexpr const Kernels* table_avx512 = &avx512::kernels;
#else
constexpr const Kernels* table_avx512 = kNone;
#endif

#if !(defined(__x86_64__) || defined(__i386__))
#define __builtin_cpu_supports(feature) false
#endif

const IsaRow* active = nullptr;

}  // namespace

const IsaRow* isa_rows(int* count) noexcept {
    static const IsaRow rows[] = {
#define LTK_ISA(NAME, PROCESSORS, FLAGS, CHECK) {#NAME, (CHECK), table_##NAME},
#include "isa.def"
#undef LTK_ISA
    };
    *count = static_cast<int>(sizeof(rows) / sizeof(rows[0]));
    return rows;
}

const IsaRow* choose_isa(const char** error) noexcept {
    int count = 0;
    const IsaRow* rows = isa_rows(&count);
    const char* wanted = std::getenv("LTKERNELS_ISA");
    const IsaRow* found = nullptr;
    *error = nullptr;
    for (int i = 0; i < count; ++i) {
        const bool usable = rows[i].supported && rows[i].kernels != nullptr;
        if (wanted != nullptr && *wanted != '\0') {
            if (std::strcmp(wanted, rows[i].name) == 0) {
                if (!usable) {
                    *error = "this processor or this build does not have it";
                    return nullptr;
                }
                found = &rows[i];
            }
        } else if (usable) {
            found = &rows[i];
        }
    }
    if (found == nullptr) {
        *error = "no such instruction set; see ltkernels doctor for the names";
        return nullptr;
    }
    active = found;
    return found;
}

const IsaRow& active_isa() noexcept {
    return *active;
}

const Kernels& kernels() noexcept {
    return *active->kernels;
}

}  // namespace ltk
