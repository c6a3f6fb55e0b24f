// What is written once and not read soon.
#pragma once
#include <cstdint>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ltk {

// Gradients beyond this are written past the caches: nobody's cache holds them until they are read, and a plain store
// reads every line before it overwrites it. Measured at 33 MB: see benchmarks/results.
constexpr int64_t kStreamBytes = 24 << 20;

// Memory this large comes fresh from the operating system, page by page as it is first written; a fault for 4 KiB costs
// more than the row kernel's work on them. Measured on 45 MB: half of a call's time. A hint: where huge pages are off,
// nothing happens.
inline void prefer_huge_pages(const void* memory, int64_t bytes) noexcept {
#if defined(__linux__)
    constexpr uintptr_t page = 2 << 20;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

}  // namespace ltk
