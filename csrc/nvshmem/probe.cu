// The protocol, for each PE; S is the PE whose target this one is.
//
//   1. All threads of the block put `outbox` into the target's `inbox`, followed by `value` in its `signal`. NVSHMEM
//      delivers the signal behind the data, and a blocking put has read `outbox` when it returns.
//   2. One thread tests its own `signal` until it is at least `value`, or until `timeout` nanoseconds have passed since
//      it began. nvshmem_uint64_test, when it succeeds, orders what S put before its signal (1) before what this thread
//      reads next; none of NVSHMEM's waiting calls has a limit.
//   3. It writes what it found to `found`, and the kernel ends. Whoever reads `inbox` does so behind the kernel, on the
//      stream.
//
// `inbox` may be sent to again when this PE is known to have read it, which is up to the caller: a barrier of the host
// between two probes will do. The value grows from probe to probe, so that nothing is ever cleared.
#include <nvshmem.h>
#include <nvshmemx.h>

#include "cuda/check.h"
#include "cuda/device/memory.cuh"
#include "nvshmem/probe.h"

namespace hpc_moe::nvshmem {
namespace {

constexpr int kThreads = 128;

__device__ uint64_t wait_for_signal(const ProbeParams& p) {
    const uint64_t begin = cuda::nanoseconds();
    while (!nvshmem_uint64_test(p.signal, NVSHMEM_CMP_GE, p.value)) {
        if (cuda::nanoseconds() - begin > p.timeout) break;
    }
    return cuda::load_relaxed_sys(p.signal);
}

__global__ void __launch_bounds__(kThreads) probe(const ProbeParams p) {
    nvshmemx_putmem_signal_block(p.inbox, p.outbox, p.num_bytes, p.signal, p.value, NVSHMEM_SIGNAL_SET, p.target);
    if (threadIdx.x == 0) *p.found = wait_for_signal(p);
}

}  // namespace

void launch_probe(const ProbeParams& params, cudaStream_t stream) {
    probe<<<1, kThreads, 0, stream>>>(params);
    cuda::check(cudaGetLastError(), "launching the probe");
}

}  // namespace hpc_moe::nvshmem
