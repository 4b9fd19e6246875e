// A GPU's thread model on the CPU, so that kernels compile with a C++ compiler and run without a GPU.
//
// A block is a thread of the operating system, and its threads are fibers, which take turns: one goes on until it waits
// for a warp or a block, or looks at memory that others write. Blocks and ranks run side by side. This is about logic:
// who waits for whom, what lies where, what is used again when. Of the GPU's memory model it shows nothing beyond what
// this CPU does.
//
// The compiler includes this file ahead of each kernel's source (-include). Headers of csrc/ that are made of PTX have
// stand-ins beside this file, in folders of the same names.
#pragma once

// Ahead of what follows: these use CUDA's keywords in CUDA's meaning, or as attributes of the compiler.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <numeric>
#include <thread>
#include <vector>

#define HPC_MOE_EMULATION
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __launch_bounds__
#undef __noinline__
#undef __shared__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__
#define __shared__ thread_local  // a thread is a block

namespace emulation {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr size_t kStackBytes = 64 << 10;

// What the lanes of a warp do together.
enum class Together { kShuffle, kShuffleXor, kShuffleUp, kBallot, kAll, kAny, kOr, kMatch, kMeet };

struct Warp {
    uint64_t given[kWarp];
    uint64_t taken[2][kWarp];  // what was given, of the last two times: slow lanes still read the one before
    Together what[kWarp];
    int arrived = 0;
    uint64_t times = 0;
};

struct Barrier {
    int arrived = 0;
    uint64_t times = 0;
    bool all = true;
    bool result[2];
};

struct Fiber {
    ucontext_t start;
    jmp_buf rest;  // where it goes on; a jump is much faster than a change of context, which asks the kernel
    uint3 index;
    bool has_begun = false, is_done = false;
};

struct Block {
    uint3 index;
    dim3 size, grid;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    Barrier barrier;
    int current = 0, num_alive = 0;
    ucontext_t outside;
    const std::function<void()>* body;
};

inline thread_local Block* current_block = nullptr;
inline Block& block() { return *current_block; }
inline Fiber& self() { return block().fibers[block().current]; }
inline int lane() { return self().index.x % kWarp; }

// The other fibers' turn.
inline void yield() {
    Block& b = block();
    const int from = b.current, count = static_cast<int>(b.fibers.size());
    int to = from;
    do {
        to = (to + 1) % count;
    } while (b.fibers[to].is_done && to != from);
    if (to == from) return;
    b.current = to;
    if (_setjmp(b.fibers[from].rest) != 0) return;
    if (b.fibers[to].has_begun) _longjmp(b.fibers[to].rest, 1);
    setcontext(&b.fibers[to].start);
}

inline void run_fiber() {
    Block& b = block();
    self().has_begun = true;
    (*b.body)();
    self().is_done = true;
    if (--b.num_alive == 0) setcontext(&b.outside);
    yield();
}

inline void run_block(unsigned index, unsigned num_blocks, unsigned num_threads, const std::function<void()>& body) {
    Block b;
    current_block = &b;
    b.index = {index, 0, 0};
    b.size = dim3(num_threads);
    b.grid = dim3(num_blocks);
    b.fibers.resize(num_threads);
    b.warps.resize((num_threads + kWarp - 1) / kWarp);
    b.num_alive = static_cast<int>(num_threads);
    b.body = &body;
    const size_t bytes = kStackBytes * num_threads;
    void* stacks = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stacks == MAP_FAILED) abort();
    for (unsigned i = 0; i < num_threads; ++i) {
        Fiber& fiber = b.fibers[i];
        fiber.index = {i, 0, 0};
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = static_cast<uint8_t*>(stacks) + i * kStackBytes;
        fiber.start.uc_stack.ss_size = kStackBytes;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, run_fiber, 0);
    }
    swapcontext(&b.outside, &b.fibers[0].start);
    munmap(stacks, bytes);
}

// Runs a kernel, to its end. A thread for each block: __shared__ is new in each.
inline void launch(int num_blocks, int num_threads, const std::function<void()>& body) {
    std::vector<std::thread> blocks;
    for (int i = 0; i < num_blocks; ++i)
        blocks.emplace_back([=, &body] { run_block(i, num_blocks, num_threads, body); });
    for (std::thread& one : blocks) one.join();
}

// All lanes of a warp: what each gives. The result holds until the warp has done two more such things.
inline const uint64_t* exchange(Together what, uint64_t given) {
    Warp& warp = block().warps[self().index.x / kWarp];
    const uint64_t times = warp.times;
    warp.given[lane()] = given;
    warp.what[lane()] = what;
    if (++warp.arrived < kWarp) {
        while (warp.times == times) yield();
        return warp.taken[times & 1];
    }
    for (int i = 0; i < kWarp; ++i) {
        if (warp.what[i] == what) continue;
        fprintf(stderr, "a warp is in two places: block %u, warp %u, lane %d at %d, lane %d at %d\n", block().index.x,
                self().index.x / kWarp, lane(), static_cast<int>(what), i, static_cast<int>(warp.what[i]));
        abort();
    }
    memcpy(warp.taken[times & 1], warp.given, sizeof warp.given);
    warp.arrived = 0;
    ++warp.times;
    return warp.taken[times & 1];
}

// All threads of the block: whether `mine` is true in all.
inline bool meet(bool mine) {
    Barrier& barrier = block().barrier;
    const uint64_t times = barrier.times;
    barrier.all &= mine;
    if (++barrier.arrived == static_cast<int>(block().size.x)) {
        barrier.result[times & 1] = barrier.all;
        barrier.all = true;
        barrier.arrived = 0;
        ++barrier.times;
    } else {
        while (barrier.times == times) yield();
    }
    return barrier.result[times & 1];
}

template <typename T>
uint64_t bits_of(T value) {
    static_assert(sizeof value <= sizeof(uint64_t));
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
T value_of(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// A bit for each lane that gave `bits`.
inline unsigned lanes_with(const uint64_t* given, uint64_t bits) {
    unsigned lanes = 0;
    for (int i = 0; i < kWarp; ++i) lanes |= (given[i] == bits ? 1u : 0u) << i;
    return lanes;
}

// What lane `from` gives.
template <typename T>
T shuffle(Together what, T value, int from) {
    return value_of<T>(exchange(what, bits_of(value))[from]);
}

}  // namespace emulation

// --- what CUDA has built in, as far as the kernels use it

#define threadIdx (emulation::self().index)
#define blockIdx (emulation::block().index)
#define blockDim (emulation::block().size)
#define gridDim (emulation::block().grid)

using emulation::Together;
using std::max;
using std::min;

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
    return emulation::shuffle(Together::kShuffle, value, from % emulation::kWarp);
}

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return emulation::shuffle(Together::kShuffleXor, value, emulation::lane() ^ mask);
}

template <typename T>
T __shfl_up_sync(unsigned, T value, int distance) {
    const int lane = emulation::lane();
    return emulation::shuffle(Together::kShuffleUp, value, lane >= distance ? lane - distance : lane);
}

inline unsigned __ballot_sync(unsigned, bool is) {
    return emulation::lanes_with(emulation::exchange(Together::kBallot, is), 1);
}

inline bool __all_sync(unsigned, bool is) {
    return emulation::lanes_with(emulation::exchange(Together::kAll, is), 1) == ~0u;
}

inline bool __any_sync(unsigned, bool is) {
    return emulation::lanes_with(emulation::exchange(Together::kAny, is), 1) != 0;
}

template <typename T>
unsigned __match_any_sync(unsigned, T value) {
    const uint64_t bits = emulation::bits_of(value);
    return emulation::lanes_with(emulation::exchange(Together::kMatch, bits), bits);
}

inline unsigned __reduce_or_sync(unsigned, unsigned value) {
    const uint64_t* given = emulation::exchange(Together::kOr, value);
    return static_cast<unsigned>(std::accumulate(given, given + emulation::kWarp, uint64_t{0}, std::bit_or<>()));
}

inline void __syncwarp() { emulation::exchange(Together::kMeet, 0); }
inline void __syncthreads() { emulation::meet(true); }
inline int __syncthreads_and(int is) { return emulation::meet(is != 0); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __nanosleep(unsigned) { emulation::yield(); }
inline int64_t clock64() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __ffs(unsigned value) { return __builtin_ffs(static_cast<int>(value)); }
inline int __clz(unsigned value) { return value == 0 ? 32 : __builtin_clz(value); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline unsigned __float_as_uint(float value) { return static_cast<unsigned>(emulation::bits_of(value)); }
inline float __uint_as_float(unsigned bits) { return emulation::value_of<float>(bits); }

template <typename T, typename U>
T atomicAdd(T* word, U value) {
    return __atomic_fetch_add(word, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicOr(T* word, T value) {
    return __atomic_fetch_or(word, value, __ATOMIC_RELAXED);
}

template <typename T>
T atomicMax(T* word, T value) {
    T old = __atomic_load_n(word, __ATOMIC_RELAXED);
    while (old < value && !__atomic_compare_exchange_n(word, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
    }
    return old;
}

template <typename T>
T atomicExch(T* word, T value) {
    return __atomic_exchange_n(word, value, __ATOMIC_RELAXED);
}

inline unsigned atomicCAS(unsigned* word, unsigned expected, unsigned value) {
    __atomic_compare_exchange_n(word, &expected, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    return expected;
}
