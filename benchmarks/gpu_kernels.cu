// The GPU benchmark's own kernels, independent of the library: what aligns the ranks, and what the links can carry.
//
// Every rank has a window, which all others open through CUDA IPC:
//
//     Header    flags[s]: the epoch that rank s has reached; num_timeouts: of this rank's own waits
//     rows      a region for each source rank, which only that rank writes
//
// *Align.* One block. Lane r stores this rank's epoch into flags[rank] of rank r's window, with release, and waits
// until its own window's flags[r] has come as far, with acquire. So all ranks' streams pass it within the time of one
// flag, and everything that peers wrote before is visible after it. Every wait has a limit: then num_timeouts counts,
// and the kernel ends.
//
// *Push.* Every rank sends `rows_per_peer` rows to each other rank. One thread of a warp moves rows by bulk copies:
// global memory to shared memory, shared memory to the peer's window; two rows a warp are under way. Consecutive rows
// go to different peers, which all ranks take in turns of their own: no link waits for another, and no rank is
// everybody's target. The kernel ends when its copies have arrived (wait_group 0, not .read).
//
// gpu_kernels.py compiles this file with nvcc, and calls the functions at its end, which return CUDA's error codes.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace {

constexpr int kMaxRanks = 8;
constexpr size_t kHeaderBytes = 4096;
constexpr int kBarrierBytes = 1024;  // at the start of shared memory: two mbarriers a warp

struct Header {
    uint64_t flags[kMaxRanks];
    uint32_t num_timeouts;
};

struct AlignParams {
    uint8_t* windows[kMaxRanks];  // own included
    int32_t rank, num_ranks;
    uint64_t epoch;     // one more than at the last call
    uint64_t delay_ns;  // to wait before, so that the CPU can enqueue what comes after
    uint64_t limit_ns;  // of each wait
};

struct PushParams {
    uint8_t* targets[kMaxRanks];  // this rank's region in the window of each rank
    const uint8_t* source;        // [num_source_rows, row_bytes] of this rank
    int64_t num_source_rows;
    int64_t first_source_row;  // the rows sent are this one and those after it, around the end
    int32_t rows_per_peer;
    int32_t row_bytes;  // a multiple of 16
    int32_t rank, num_ranks;
};

__device__ uint64_t nanoseconds() {
    uint64_t value;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value));
    return value;
}

__global__ void align(const __grid_constant__ AlignParams p) {
    const int lane = threadIdx.x;
    const uint64_t begin = nanoseconds();
    while (nanoseconds() - begin < p.delay_ns) {
    }
    __syncwarp();
    if (lane >= p.num_ranks) return;
    uint64_t* theirs = &reinterpret_cast<Header*>(p.windows[lane])->flags[p.rank];
    asm volatile("st.release.sys.global.b64 [%0], %1;" ::"l"(theirs), "l"(p.epoch) : "memory");
    auto* own = reinterpret_cast<Header*>(p.windows[p.rank]);
    const uint64_t sent = nanoseconds();
    uint64_t reached = 0;
    do {
        asm volatile("ld.acquire.sys.global.b64 %0, [%1];" : "=l"(reached) : "l"(&own->flags[lane]) : "memory");
        if (reached < p.epoch && nanoseconds() - sent > p.limit_ns) {
            atomicAdd(&own->num_timeouts, 1u);
            return;
        }
    } while (reached < p.epoch);
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// The n-th row that this rank sends: P = num_ranks - 1 rows in turn go to the P peers, in an order that changes from
// turn to turn, for else a warp would send all its rows to one peer where the number of warps is a multiple of P.
__device__ int peer_of(const PushParams& p, int64_t n) {
    const int num_peers = p.num_ranks - 1;
    const auto turn = static_cast<uint32_t>(n / num_peers);
    const int shift = static_cast<int>((turn * 2654435761u >> 16) % num_peers);
    return (p.rank + 1 + static_cast<int>(n % num_peers + shift) % num_peers) % p.num_ranks;
}

__device__ uint32_t shared_address(const void* memory) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

__device__ void load_row(const PushParams& p, int64_t n, uint8_t* slot, uint64_t* barrier) {
    const uint8_t* from = p.source + (p.first_source_row + n) % p.num_source_rows * p.row_bytes;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
                 "r"(p.row_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(slot)),
                 "l"(from), "r"(p.row_bytes), "r"(shared_address(barrier))
                 : "memory");
}

__device__ void wait_for_load(uint64_t* barrier, uint32_t parity) {
    uint32_t done = 0;
    while (!done) {
        asm volatile(
            "{\n .reg .pred p;\n mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n selp.u32 %0, 1, 0, p;\n}"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    }
}

__device__ void store_row(const PushParams& p, int64_t n, const uint8_t* slot) {
    uint8_t* to = p.targets[peer_of(p, n)] + n / (p.num_ranks - 1) * p.row_bytes;
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(slot)),
                 "r"(p.row_bytes)
                 : "memory");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// One thread of each warp. While a row is stored from one slot, the next is loaded into the other.
__device__ void push_rows(const PushParams& p, uint8_t* slots, uint64_t* barriers) {
    for (int i = 0; i < 2; ++i) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(&barriers[i])) : "memory");
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const int warps_per_block = blockDim.x / 32;
    const int64_t num_rows = static_cast<int64_t>(p.rows_per_peer) * (p.num_ranks - 1);
    const int64_t step = static_cast<int64_t>(gridDim.x) * warps_per_block;
    int64_t n = blockIdx.x + static_cast<int64_t>(gridDim.x) * (threadIdx.x / 32);
    if (n < num_rows) load_row(p, n, slots, &barriers[0]);
    for (int64_t i = 0; n < num_rows; ++i, n += step) {
        const int slot = i & 1, other = 1 - slot;
        if (n + step < num_rows) {
            asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");  // the other slot's row has left
            load_row(p, n + step, slots + other * p.row_bytes, &barriers[other]);
        }
        wait_for_load(&barriers[slot], i >> 1 & 1);
        store_row(p, n, slots + slot * p.row_bytes);
    }
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

#else

__device__ void push_rows(const PushParams&, uint8_t*, uint64_t*) {}  // launch_push refuses such GPUs

#endif

__global__ void push(const __grid_constant__ PushParams p) {
    extern __shared__ __align__(128) uint8_t shared[];
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 != 0) return;
    push_rows(p, shared + kBarrierBytes + 2 * warp * p.row_bytes, reinterpret_cast<uint64_t*>(shared) + 2 * warp);
}

}  // namespace

extern "C" {

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

int use_device(int device) { return cudaSetDevice(device); }

// Cleared memory of its own allocation, as IPC needs; `bytes` without the header.
int allocate_window(size_t bytes, void** window) {
    const cudaError_t error = cudaMalloc(window, kHeaderBytes + bytes);
    return error != cudaSuccess ? error : cudaMemset(*window, 0, kHeaderBytes + bytes);
}

int free_window(void* window) { return cudaFree(window); }

// `handle`: 64 bytes.
int export_window(void* window, void* handle) {
    return cudaIpcGetMemHandle(static_cast<cudaIpcMemHandle_t*>(handle), window);
}

int import_window(const void* handle, void** window) {
    return cudaIpcOpenMemHandle(window, *static_cast<const cudaIpcMemHandle_t*>(handle),
                                cudaIpcMemLazyEnablePeerAccess);
}

int close_window(void* window) { return cudaIpcCloseMemHandle(window); }

size_t header_bytes() { return kHeaderBytes; }

int read_num_timeouts(const void* window, uint32_t* num_timeouts) {
    const auto* header = static_cast<const Header*>(window);
    return cudaMemcpy(num_timeouts, &header->num_timeouts, sizeof(uint32_t), cudaMemcpyDeviceToHost);
}

int launch_align(void* const* windows, int rank, int num_ranks, uint64_t epoch, uint64_t delay_ns, uint64_t limit_ns,
                 void* stream) {
    AlignParams params = {};
    for (int r = 0; r < num_ranks; ++r) params.windows[r] = static_cast<uint8_t*>(windows[r]);
    params.rank = rank;
    params.num_ranks = num_ranks;
    params.epoch = epoch;
    params.delay_ns = delay_ns;
    params.limit_ns = limit_ns;
    align<<<1, 32, 0, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

// The rows of rank s lie at `header_bytes() + s * region_bytes` of a window.
int launch_push(void* const* windows, int rank, int num_ranks, size_t region_bytes, const void* source,
                int64_t num_source_rows, int64_t first_source_row, int rows_per_peer, int row_bytes, int num_sms,
                int warps_per_sm, void* stream) {
    int device = 0, major = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    if (error != cudaSuccess) return error;
    if (major < 9) return cudaErrorNotSupported;
    PushParams params = {};
    for (int r = 0; r < num_ranks; ++r) {
        params.targets[r] = static_cast<uint8_t*>(windows[r]) + kHeaderBytes + rank * region_bytes;
    }
    params.source = static_cast<const uint8_t*>(source);
    params.num_source_rows = num_source_rows;
    params.first_source_row = first_source_row;
    params.rows_per_peer = rows_per_peer;
    params.row_bytes = row_bytes;
    params.rank = rank;
    params.num_ranks = num_ranks;
    const int shared_bytes = kBarrierBytes + 2 * warps_per_sm * row_bytes;
    error = cudaFuncSetAttribute(push, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
    push<<<num_sms, 32 * warps_per_sm, shared_bytes, static_cast<cudaStream_t>(stream)>>>(params);
    return cudaGetLastError();
}

}  // extern "C"
