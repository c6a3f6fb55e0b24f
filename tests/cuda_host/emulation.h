// Runs the thread blocks of a CUDA kernel on the host, so that the kernels of csrc/cuda are tested where there is no
// GPU:
//
//     g++ -x c++ -std=c++17 -DLTK_CUDA_HOST -I tests/cuda_host csrc/cuda/entry.cu
//
// Blocks run one after the other (those of a cluster together), their threads as fibers of one host thread: a thread
// runs until a barrier, then the next one does. With LTK_HOST_THREADS they are real threads, so that the thread
// sanitizer sees a missing barrier. Emulated: indices, static and dynamic shared memory, __syncthreads, __syncwarp,
// shuffles, atomicAdd, clusters and their distributed shared memory. A barrier that not all threads reach, or that they
// reach by different calls, aborts. 16-byte accesses must be aligned. Shared memory starts as NaN. Clusters of more
// than 8 blocks need each kernel's permission, and code older than sm_90 (ltk_emulation_code) knows no clusters.
#pragma once
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <thread>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __maxnreg__(...)

namespace emulation {

[[noreturn]] inline void fail(const char* what) {
    std::fprintf(stderr, "CUDA emulation: %s\n", what);
    std::abort();
}

struct Dim {
    unsigned x = 1;
};

struct Barrier {
    int expected = 0, arrived = 0, tag = 0;
    uint64_t generation = 0;
};

struct Warp {
    Barrier barrier;
    alignas(8) unsigned char slot[2][32][8];
};

struct Cluster;

struct Block {
    Dim index;
    Barrier barrier;
    std::vector<Warp> warps;
    std::unique_ptr<unsigned char[]> fixed, dynamic;
    size_t fixed_bytes = 0;
    Cluster* cluster = nullptr;
    int rank = 0;
};

struct Cluster {
    Barrier barrier;
    std::vector<Block> blocks;
};

struct Thread {
    Dim index;
    Block* block = nullptr;
    Warp* warp = nullptr;
    int lane = 0, parity = 0;
    bool done = false, arrived = false;  // at the cluster's barrier, and has not waited yet
    uint64_t generation = 0;             // of that barrier
    jmp_buf jump;
    ucontext_t start;
};

inline Dim grid_dim, block_dim;

#if defined(LTK_HOST_THREADS)

inline thread_local Thread* now = nullptr;
inline std::mutex mutex;
inline std::condition_variable released;

inline void complete(Barrier& b) {
    b.arrived = 0;
    ++b.generation;
    released.notify_all();
}
inline uint64_t arrive(Barrier& b, int tag) {
    std::unique_lock<std::mutex> lock(mutex);
    if (b.arrived == 0) b.tag = tag;
    if (b.tag != tag) fail("threads met at one barrier by different calls");
    const uint64_t generation = b.generation;
    if (++b.arrived == b.expected) complete(b);
    return generation;
}
inline void wait_beyond(Barrier& b, uint64_t generation) {
    std::unique_lock<std::mutex> lock(mutex);
    released.wait(lock, [&] { return b.generation != generation; });
}
inline void leave(Barrier& b) {
    std::unique_lock<std::mutex> lock(mutex);
    if (--b.expected > 0 && b.arrived == b.expected) complete(b);
}

#else

inline Thread* now = nullptr;
inline jmp_buf scheduler;
inline bool progress = false;

inline void complete(Barrier& b) {
    b.arrived = 0;
    ++b.generation;
    progress = true;
}
inline uint64_t arrive(Barrier& b, int tag) {
    if (b.arrived == 0) b.tag = tag;
    if (b.tag != tag) fail("threads met at one barrier by different calls");
    const uint64_t generation = b.generation;
    if (++b.arrived == b.expected) complete(b);
    return generation;
}
inline void wait_beyond(Barrier& b, uint64_t generation) {
    while (b.generation == generation)
        if (_setjmp(now->jump) == 0) _longjmp(scheduler, 1);
}
inline void leave(Barrier& b) {
    if (--b.expected > 0 && b.arrived == b.expected) complete(b);
}

#endif

inline void wait(Barrier& b, int tag) {
    wait_beyond(b, arrive(b, tag));
}

enum Tag { kSyncWarp = 1, kSyncThreads, kClusterSync, kShuffle };

inline void run_thread(const std::function<void()>& kernel) {
    kernel();
    if (now->arrived) fail("a thread ends between arriving at the cluster's barrier and waiting");
    now->done = true;
    leave(now->warp->barrier);
    leave(now->block->barrier);
    leave(now->block->cluster->barrier);
}

inline std::unique_ptr<unsigned char[]> unset(size_t bytes) {
    std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
    std::memset(memory.get(), 0xff, bytes);
    return memory;
}

inline void* shared_memory(size_t fixed) {
    Block& block = *now->block;
    if (fixed == 0) return block.dynamic.get();
#if defined(LTK_HOST_THREADS)
    std::unique_lock<std::mutex> lock(mutex);
#endif
    if (block.fixed == nullptr) {
        block.fixed = unset(fixed);
        block.fixed_bytes = fixed;
    }
    if (block.fixed_bytes != fixed) fail("one static shared structure a kernel, please");
    return block.fixed.get();
}

inline void prepare(Cluster& cluster, std::vector<Thread>& threads, int64_t first, int block, size_t shared) {
    cluster.barrier = Barrier{};
    cluster.barrier.expected = static_cast<int>(threads.size());
    for (size_t rank = 0; rank < cluster.blocks.size(); ++rank) {
        Block& b = cluster.blocks[rank];
        b.index.x = static_cast<unsigned>(first + static_cast<int64_t>(rank));
        b.barrier = Barrier{};
        b.barrier.expected = block;
        b.warps.assign(static_cast<size_t>(block) / 32, Warp{});
        b.fixed.reset();
        b.dynamic = shared == 0 ? nullptr : unset(shared);
        b.cluster = &cluster;
        b.rank = static_cast<int>(rank);
        for (int t = 0; t < block; ++t) {
            Thread& thread = threads[rank * static_cast<size_t>(block) + static_cast<size_t>(t)];
            thread.index.x = static_cast<unsigned>(t);
            thread.block = &b;
            thread.warp = &b.warps[static_cast<size_t>(t) / 32];
            thread.warp->barrier.expected = 32;
            thread.lane = t % 32;
            thread.parity = 0;
            thread.done = thread.arrived = false;
        }
    }
}

#if !defined(LTK_HOST_THREADS)
inline const std::function<void()>* running = nullptr;
inline void fiber() {
    run_thread(*running);
    progress = true;
    _longjmp(scheduler, 1);
}
constexpr size_t kStack = 64 * 1024;
inline std::vector<unsigned char*> stacks;  // kept: their pages are touched once

inline void run_fibers(std::vector<Thread>& threads) {
    while (stacks.size() < threads.size()) {
        void* p = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED) fail("no memory for a stack");
        stacks.push_back(static_cast<unsigned char*>(p));
    }
    for (size_t t = 0; t < threads.size(); ++t) {
        getcontext(&threads[t].start);
        threads[t].start.uc_stack.ss_sp = stacks[t];
        threads[t].start.uc_stack.ss_size = kStack;
        threads[t].start.uc_link = nullptr;
        makecontext(&threads[t].start, fiber, 0);
    }
    static size_t alive, turn;
    static bool first;
    first = true;
    for (alive = threads.size(); alive > 0; first = false) {
        progress = false;
        for (turn = 0; turn < threads.size(); ++turn) {
            if (threads[turn].done) continue;
            now = &threads[turn];
            if (_setjmp(scheduler) == 0) {
                if (first) setcontext(&now->start);
                _longjmp(now->jump, 1);
            }
            if (threads[turn].done) --alive;
        }
        if (!progress) fail("deadlock: a barrier that not all threads reach");
    }
}
#endif

inline int code = 90;                         // what the kernels were compiled for
inline std::set<const void*> large_clusters;  // the kernels that asked for more than 8 blocks

inline int code_version(const void*) {
    return code;
}
inline void allow_large_clusters(const void* kernel) {
    large_clusters.insert(kernel);
}
inline bool clusters_fit(const void* kernel, int, int size) {
    return size <= 8 || (size <= 16 && large_clusters.count(kernel) != 0);
}

inline const char* launch(const void* function, const std::function<void()>& kernel, int64_t grid, int block,
                          int cluster_size, size_t shared) {
    if (!clusters_fit(function, block, cluster_size)) return "cluster misconfiguration";
    if (grid <= 0 || grid % cluster_size != 0 || block <= 0 || block > 1024 || block % 32 != 0 || shared > 48 * 1024)
        fail("bad launch");
    grid_dim.x = static_cast<unsigned>(grid);
    block_dim.x = static_cast<unsigned>(block);
    Cluster cluster;
    cluster.blocks.resize(static_cast<size_t>(cluster_size));
    std::vector<Thread> threads(static_cast<size_t>(cluster_size) * static_cast<size_t>(block));
#if defined(LTK_HOST_THREADS)
    for (int64_t first = 0; first < grid; first += cluster_size) {
        prepare(cluster, threads, first, block, shared);
        std::vector<std::thread> pool;
        for (Thread& thread : threads)
            pool.emplace_back([&] {
                now = &thread;
                run_thread(kernel);
            });
        for (std::thread& thread : pool) thread.join();
    }
#else
    running = &kernel;
    for (int64_t first = 0; first < grid; first += cluster_size) {
        prepare(cluster, threads, first, block, shared);
        run_fibers(threads);
    }
    now = nullptr;
#endif
    return nullptr;
}

inline int cluster_rank() {
    return code >= 90 ? now->block->rank : 0;
}
inline void cluster_arrive() {
    if (code < 90) return;
    if (now->arrived) fail("a thread arrives twice at the cluster's barrier without waiting");
    now->arrived = true;
    now->generation = arrive(now->block->cluster->barrier, kClusterSync);
}
inline void cluster_wait() {
    if (code < 90) return;
    if (!now->arrived) fail("a thread waits at the cluster's barrier and has not arrived");
    wait_beyond(now->block->cluster->barrier, now->generation);
    now->arrived = false;
}
template <class S>
S* cluster_peer(S* shared, int rank) {
    if (code < 90) return shared;
    Block& other = now->block->cluster->blocks[static_cast<size_t>(rank)];
    const auto offset = reinterpret_cast<unsigned char*>(shared) - now->block->fixed.get();
    return reinterpret_cast<S*>(other.fixed.get() + offset);
}

template <class T>
T shuffle(T value, int from, int tag) {
    static_assert(sizeof(T) <= 8, "");
    Warp& warp = *now->warp;
    if (warp.barrier.expected != 32) fail("a shuffle without all lanes");
    const int parity = now->parity;
    now->parity ^= 1;
    std::memcpy(warp.slot[parity][now->lane], &value, sizeof value);
    wait(warp.barrier, tag);
    std::memcpy(&value, warp.slot[parity][from], sizeof value);
    return value;
}

inline float bits_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline uint16_t float_to_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, fraction = h & 0x3ffu;
    if (exponent == 31) return bits_float(sign | 0x7f800000u | fraction << 13);
    if (exponent == 0) {
        const float x = std::ldexp(static_cast<float>(fraction), -24);
        return sign != 0 ? -x : x;
    }
    return bits_float(sign | (exponent + 112u) << 23 | fraction << 13);
}
inline uint16_t float_to_half(float x) {
    const uint32_t sign = float_bits(x) >> 16 & 0x8000u;
    const float size = std::fabs(x);
    if (x != x) return 0x7fff;
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
    if (size < 6.103515625e-5f)
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyint(size * 16777216.0f)));
    const uint32_t bits = float_bits(size);
    return static_cast<uint16_t>(sign | (((bits + 0xfffu + ((bits >> 13) & 1u)) >> 13) - (112u << 10)));
}

inline void check_aligned(const void* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) fail("a 16-byte access that is not aligned");
}
template <class R>
R load16(const void* p) {
    check_aligned(p);
    R x;
    std::memcpy(&x, p, 16);
    return x;
}
template <class R>
void store16(void* p, const R& x) {
    check_aligned(p);
    std::memcpy(p, &x, 16);
}

}  // namespace emulation

#define threadIdx (emulation::now->index)
#define blockIdx (emulation::now->block->index)
#define blockDim (emulation::block_dim)
#define gridDim (emulation::grid_dim)

inline void __syncthreads() {
    emulation::wait(emulation::now->block->barrier, emulation::kSyncThreads);
}
inline void __syncwarp() {
    emulation::wait(emulation::now->warp->barrier, emulation::kSyncWarp);
}
template <class T>
T __shfl_xor_sync(unsigned lanes, T value, int offset) {
    if (lanes != 0xffffffffu) emulation::fail("a shuffle that names some lanes only");
    return emulation::shuffle(value, emulation::now->lane ^ offset, emulation::kShuffle + offset);
}
template <class T>
T __shfl_sync(unsigned lanes, T value, int lane) {
    if (lanes != 0xffffffffu) emulation::fail("a shuffle that names some lanes only");
    return emulation::shuffle(value, lane, emulation::kShuffle + 32 + lane);
}
template <class T>
T __ldg(const T* p) {
    return *p;
}
template <class T>
T __ldcg(const T* p) {
    return *p;
}
inline unsigned atomicAdd(unsigned* p, unsigned x) {
    return __atomic_fetch_add(p, x, __ATOMIC_ACQ_REL);
}
inline void __threadfence() {
    // The sanitizer does not know fences; the ticket that follows is an acquire-release operation in any case.
}

// For the tests: the architecture of the code that "runs".
extern "C" inline __attribute__((used, visibility("default"))) void ltk_emulation_code(int version) {
    emulation::code = version;
}
