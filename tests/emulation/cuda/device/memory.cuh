// Stands in for csrc/cuda/device/memory.cuh, as far as low-latency kernels use it. Loads of what others write begin
// with the other fibers' turn, for they are what loops wait with.
#pragma once

#include "device.h"

#define HPC_MOE_HAS_BULK_COPIES 0

namespace hpc_moe::cuda {

inline void wait_for_earlier_kernels() {}
inline void let_next_kernel_begin() {}

inline uint64_t load_acquire_sys(const uint64_t* word) {
    emulation::yield();
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

inline void store_release_sys(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELEASE); }

inline uint64_t load_relaxed_sys(const uint64_t* word) {
    emulation::yield();
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

inline void store_relaxed_sys(uint64_t* word, uint64_t value) { __atomic_store_n(word, value, __ATOMIC_RELAXED); }

// One access of 16 bytes, which processors that have vectors of them do not split where they are aligned.
using Vector = long long __attribute__((vector_size(16)));

inline uint4 load_relaxed_16(const void* from) {
    emulation::yield();
    const Vector vector = *static_cast<const volatile Vector*>(from);
    uint4 value;
    memcpy(&value, &vector, sizeof value);
    return value;
}

inline void store_relaxed_16(void* to, const uint4& value) {
    Vector vector;
    memcpy(&vector, &value, sizeof vector);
    *static_cast<volatile Vector*>(to) = vector;
}

inline uint32_t load_relaxed_gpu(const uint32_t* word) {
    emulation::yield();
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

template <typename T, typename U>
T add_acq_rel_gpu(T* word, U value) {
    return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}

inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

inline uint64_t nanoseconds() {
    emulation::yield();
    return static_cast<uint64_t>(clock64());
}

inline uint4 load_16(const void* from) {
    uint4 value;
    memcpy(&value, from, sizeof value);
    return value;
}

inline void load_16_if(bool wanted, const void* from, uint4& value) {
    if (wanted) memcpy(&value, from, sizeof value);
}

inline void store_16(void* to, const uint4& value) { memcpy(to, &value, sizeof value); }

}  // namespace hpc_moe::cuda
