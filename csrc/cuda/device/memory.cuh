// Loads, stores and copies with a stated memory order. Scope "sys" reaches the peers' GPUs, "gpu" this one.
#pragma once

#include <cstdint>

// Bulk copies (cp.async.bulk) came with sm_90.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define HPC_MOE_HAS_BULK_COPIES 1
#else
#define HPC_MOE_HAS_BULK_COPIES 0
#endif

namespace hpc_moe::cuda {

// All that earlier kernels on the stream did is done, and visible. To be called by kernels that are launched to begin
// early (launch.h), in all threads.
__device__ inline void wait_for_earlier_kernels() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel may begin early, as far as there is room for its blocks, when all blocks have come here.
__device__ inline void let_next_kernel_begin() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// What the store of the same word with release wrote before it is visible to loads after this one.
__device__ inline uint64_t load_acquire_sys(const uint64_t* word) {
    uint64_t value;
    asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

// All that this thread wrote before (and what it knows of others' writes by a barrier) is visible to whoever acquires.
__device__ inline void store_release_sys(uint64_t* word, uint64_t value) {
    asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// No order.
__device__ inline uint64_t load_relaxed_sys(const uint64_t* word) {
    uint64_t value;
    asm volatile("ld.relaxed.sys.global.b64 %0, [%1];" : "=l"(value) : "l"(word) : "memory");
    return value;
}

__device__ inline void store_relaxed_sys(uint64_t* word, uint64_t value) {
    asm volatile("st.relaxed.sys.global.b64 [%0], %1;" ::"l"(word), "l"(value) : "memory");
}

// 16 bytes at once (PTX's scalar type .b128): whoever loads one of four words has the others of the same store. No
// order.
__device__ inline uint4 load_relaxed_16(const void* from) {
    uint64_t low, high;
    asm volatile("{\n .reg .b128 both;\n ld.relaxed.sys.global.b128 both, [%2];\n mov.b128 {%0, %1}, both;\n}"
                 : "=l"(low), "=l"(high)
                 : "l"(from)
                 : "memory");
    return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                      static_cast<uint32_t>(high >> 32));
}

__device__ inline void store_relaxed_16(void* to, const uint4& value) {
    const uint64_t low = static_cast<uint64_t>(value.y) << 32 | value.x;
    const uint64_t high = static_cast<uint64_t>(value.w) << 32 | value.z;
    asm volatile(
        "{\n .reg .b128 both;\n mov.b128 both, {%1, %2};\n st.relaxed.sys.global.b128 [%0], both;\n}" ::"l"(to),
        "l"(low), "l"(high)
        : "memory");
}

// No order; for words that only say "stop".
__device__ inline uint32_t load_relaxed_gpu(const uint32_t* word) {
    uint32_t value;
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

// Counts up; acquires what earlier counters released, and releases what came before. Returns the old value.
__device__ inline uint32_t add_acq_rel_gpu(uint32_t* word, uint32_t value) {
    uint32_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u32 %0, [%1], %2;" : "=r"(old) : "l"(word), "r"(value) : "memory");
    return old;
}

__device__ inline uint64_t add_acq_rel_gpu(uint64_t* word, uint64_t value) {
    uint64_t old;
    asm volatile("atom.add.acq_rel.gpu.global.u64 %0, [%1], %2;" : "=l"(old) : "l"(word), "l"(value) : "memory");
    return old;
}

// A barrier of all warps of the block, which may come to it in different places (to __syncthreads they may not).
__device__ inline void block_barrier() { asm volatile("barrier.sync 0;" ::: "memory"); }

__device__ inline void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// Nanoseconds; the same clock on all SMs.
__device__ inline uint64_t nanoseconds() {
    uint64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

// 16 bytes that are read once: they need not stay in L1. Never the non-coherent form, for peers write some of this.
__device__ inline uint4 load_16(const void* from) {
    uint4 value;
    asm volatile("ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(from)
                 : "memory");
    return value;
}

// The same if `wanted`, else the value stays; no branch, so that many of these are under way at once.
__device__ inline void load_16_if(bool wanted, const void* from, uint4& value) {
    asm volatile(
        "{\n .reg .pred p;\n setp.ne.u32 p, %5, 0;\n"
        " @p ld.global.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];\n}"
        : "+r"(value.x), "+r"(value.y), "+r"(value.z), "+r"(value.w)
        : "l"(from), "r"(static_cast<uint32_t>(wanted))
        : "memory");
}

__device__ inline void store_16(void* to, const uint4& value) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y), "r"(value.z),
                 "r"(value.w)
                 : "memory");
}

// --- barriers in shared memory (mbarrier): a phase ends with the last arrival, and the next one begins. Without bulk
// copies, nothing needs them.

__device__ inline uint32_t shared_address(const void* memory) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ inline void init_barrier(uint64_t* barrier, uint32_t num_arrivals = 1) {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(num_arrivals)
                 : "memory");
#endif
}

// After init_barrier, before a barrier of the threads that use it: bulk copies may arrive at it.
__device__ inline void publish_barriers() {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

// Releases to the block what this thread did before, and knows of others.
__device__ inline void arrive(uint64_t* barrier) {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#endif
}

// Whether the phase of this parity has ended; acquires what its arrivals released.
__device__ inline bool phase_is_complete(const uint64_t* barrier, uint32_t parity) {
    uint32_t complete = 1;
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile(
        "{\n .reg .pred p;\n mbarrier.test_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(complete)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
#endif
    return complete != 0;
}

// --- bulk copies: issued by one thread, moved by the copy engine of the SM; addresses and sizes are multiples of 16

// One thread: the phase that now begins is complete when so many bytes have been loaded.
__device__ inline void expect_bytes(uint64_t* barrier, uint32_t bytes) {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
#endif
}

// Starts copying global memory into shared memory, which counts for the barrier.
__device__ inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(shared)),
                 "l"(global), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
#endif
}

// Waits until the phase of this parity is complete: the bytes may be read, by threads and by bulk copies.
__device__ inline void wait_for_load(uint64_t* barrier, uint32_t parity) {
#if HPC_MOE_HAS_BULK_COPIES
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
#endif
}

// Starts copying shared memory to global memory, a peer's too. Belongs to this thread's next group.
__device__ inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
#endif
}

__device__ inline void commit_stores() {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
#endif
}

// The shared memory of this thread's stores may be used again, but for its last `kBut` groups; they may not have
// arrived.
template <int kBut>
__device__ inline void wait_until_stores_are_read() {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kBut) : "memory");
#endif
}

// This thread's stores, but for its last `kBut` groups, have arrived, as if it had written them itself: a release may
// follow.
template <int kBut>
__device__ inline void wait_until_stores_are_done() {
#if HPC_MOE_HAS_BULK_COPIES
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kBut) : "memory");
#endif
}

}  // namespace hpc_moe::cuda
