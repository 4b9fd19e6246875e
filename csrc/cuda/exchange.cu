// Exchange: every rank tells every other how many rows it will send to whom, and how many tokens select each expert.
//
// 1. Each rank writes its tokens per local expert of rank r into r's window (Control::expert_counts, by parity of
//    the epoch), plain stores of the whole block; a barrier; then warp 0 enters (device/protocol.cuh), which carries
//    the counts per rank and releases all of this.
// 2. Warp 0 acquires all entries; a barrier; the block reads the counts.
// 3. It makes the prefix matrix, the aligned counts, and, for the grouped layout, where each source's rows of each
//    expert begin. Every rank sees all entries, so all come to the same verdict on whether the call goes on.
// 4. The numbers that the CPU waits for go to the host record, then the result word that carries this exchange's
//    number.
//
// One block. Places are reused by parity, as entries are. Rows are moved by dispatch.cu, in a call of its own.
#include "cuda/check.h"
#include "cuda/device/protocol.cuh"
#include "cuda/exchange.h"

namespace hpc_moe::cuda {
namespace {

constexpr int kThreads = 256;

__device__ void send_expert_counts(const ExchangeParams& p, uint64_t epoch) {
    const int total = p.num_local_experts * p.call.num_ranks;
    stress_sleep(p.call);
    for (int expert = threadIdx.x; expert < total; expert += blockDim.x) {
        const int owner = expert / p.num_local_experts, local = expert % p.num_local_experts;
        control_of(p.call, owner)->expert_counts[epoch & 1][p.call.rank][local] = p.per_expert[expert];
    }
}

// Warp 0: takes what the layout found wrong, enters, waits. False: a peer did not come.
__device__ bool meet_with_counts(const ExchangeParams& p, uint64_t epoch, Entry* entries) {
    const int lane = threadIdx.x % 32;
    const uint64_t bad_value = p.call.state->bad_value;
    __syncwarp();
    if (lane == 0) p.call.state->bad_value = kNoBadValue;
    const EntryStatus status = bad_value == kNoBadValue ? EntryStatus::kFine : EntryStatus::kBadValue;
    fence_acq_rel_sys();  // releases, together with the entry, what the block wrote
    enter(p.call, epoch, status, p.per_rank, bad_value);
    return wait_for_entries(p.call, epoch, entries, breaks(p.call, Mutation::kCountsWithoutEntries));
}

// Warp 0: rows per (source, rank), added up over the sources.
__device__ void write_prefix_matrix(const ExchangeParams& p, const Entry* entries) {
    const int lane = threadIdx.x % 32, ranks = p.call.num_ranks;
    if (lane < ranks) {
        int sum = 0;
        for (int source = 0; source < ranks; ++source) {
            sum += entries[source].counts[lane];
            p.rank_prefix_matrix[source * ranks + lane] = sum;
            if (lane == p.call.rank) p.recv_rank_prefix_sum[source] = sum;
        }
    }
    __syncwarp();
}

// All threads: tokens of every local expert, aligned; `sizes` holds L values.
__device__ void sum_experts(const ExchangeParams& p, uint64_t epoch, int32_t* sizes) {
    for (int e = threadIdx.x; e < p.num_local_experts; e += blockDim.x) {
        int sum = 0;
        for (int source = 0; source < p.call.num_ranks; ++source) {
            p.source_begin[source * p.num_local_experts + e] = sum;  // within the expert, for now
            sum += control_of(p.call, p.call.rank)->expert_counts[epoch & 1][source][e];
        }
        const int aligned = (sum + p.expert_alignment - 1) / p.expert_alignment * p.expert_alignment;
        p.expert_ranges[2 * e] = sum;  // until the begin is known
        p.aligned_per_expert[e] = aligned;
        p.call.host->per_expert[e] = aligned;
        sizes[e] = aligned;
    }
}

// Warp 0: replaces sizes by where they begin; returns the sum.
__device__ int scan_sizes(int32_t* sizes, int count) {
    const int lane = threadIdx.x % 32;
    int total = 0;
    for (int first = 0; first < count; first += 32) {
        const int own = first + lane < count ? sizes[first + lane] : 0;
        int sum = own;
        for (int step = 1; step < 32; step *= 2) {
            const int other = __shfl_up_sync(~0u, sum, step);
            if (lane >= step) sum += other;
        }
        if (first + lane < count) sizes[first + lane] = total + sum - own;
        total += __shfl_sync(~0u, sum, 31);
    }
    __syncwarp();
    return total;
}

// All threads: rows in the grouped layout, absolute now that the begins are known.
__device__ void place_experts(const ExchangeParams& p, const int32_t* begins) {
    for (int e = threadIdx.x; e < p.num_local_experts; e += blockDim.x) {
        p.expert_ranges[2 * e] += begins[e];
        p.expert_ranges[2 * e + 1] = begins[e] + p.aligned_per_expert[e];
        for (int source = 0; source < p.call.num_ranks; ++source) {
            p.source_begin[source * p.num_local_experts + e] += begins[e];
        }
    }
}

// One thread, when nothing will be sent: the counts say so.
__device__ void clear_counts(const ExchangeParams& p) {
    for (int r = 0; r < p.call.num_ranks; ++r) p.recv_rank_prefix_sum[r] = 0;
    for (int e = 0; e < p.num_local_experts; ++e) p.aligned_per_expert[e] = 0;
}

__device__ void publish_result(const ExchangeParams& p, int rows, int num_recv_tokens) {
    HostRecord* host = p.call.host;
    host->num_recv_tokens = num_recv_tokens;
    __threadfence_system();
    *const_cast<volatile uint64_t*>(&host->result) =
        static_cast<uint64_t>(p.number) << 32 | static_cast<uint32_t>(rows);
    __threadfence_system();
}

__global__ void __launch_bounds__(kThreads, 1) exchange(const __grid_constant__ ExchangeParams p) {
    extern __shared__ int32_t sizes[];  // [L]
    __shared__ Entry entries[kMaxRanks];
    __shared__ Objection objection;
    __shared__ bool all_here;
    __shared__ int grouped_rows;
    const uint64_t epoch = begin_epoch(p.call);
    if (threadIdx.x == 0) *const_cast<volatile uint64_t*>(&p.call.host->started) = p.number;
    send_expert_counts(p, epoch);
    __syncthreads();
    if (threadIdx.x < 32) {
        const bool here = meet_with_counts(p, epoch, entries);
        const Objection found = here ? find_objection(p.call, entries, true) : Objection{0, 0};
        const bool ends = found.kind != 0 && (p.values_matter || found.kind != static_cast<int>(ErrorKind::kBadValue));
        if (found.kind != 0) report_objection(p.call, posted_entries(p.call, epoch), entries, found);
        if (here && !ends) write_prefix_matrix(p, entries);
        if (threadIdx.x == 0) {
            all_here = here;
            objection = ends ? found : Objection{0, 0};
        }
    }
    __syncthreads();
    const bool succeeded = all_here && objection.kind == 0;
    if (succeeded) {
        sum_experts(p, epoch, sizes);
        __threadfence_system();  // the counts in the host record come before the result word
        __syncthreads();
        if (threadIdx.x < 32) {
            const int total = scan_sizes(sizes, p.num_local_experts);
            if (threadIdx.x == 0) grouped_rows = total;
        }
        __syncthreads();
        place_experts(p, sizes);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        p.call.state->refused = !succeeded;
        if (!succeeded) {
            clear_counts(p);
            publish_result(p, static_cast<int>(kExchangeFailed), 0);
        }
        if (succeeded) {
            const int tokens = p.recv_rank_prefix_sum[p.call.num_ranks - 1];
            const int rows = p.grouped ? grouped_rows : tokens;
            // The peers hear of it when this rank enters the dispatch.
            p.call.state->rows_needed = p.call.entry.capacity >= 0 && rows > p.call.entry.capacity ? rows : 0;
            publish_result(p, rows, tokens);
        }
        end_epoch(p.call, epoch);
    }
}

__global__ void __launch_bounds__(32)
    reject(const __grid_constant__ Call call, const __grid_constant__ RejectionText text) {
    if (call.behind_exchange && call.state->refused) return;  // nobody goes on
    __shared__ Entry entries[kMaxRanks];
    const uint64_t epoch = begin_epoch(call);
    for (int r = 0; r < call.num_ranks; ++r) {
        PostedEntry& posted = control_of(call, r)->entries[epoch & 1][call.rank];
        for (int i = threadIdx.x; i < kTextBytes; i += 32) posted.text[i] = text.characters[i];
    }
    __syncwarp();
    fence_acq_rel_sys();
    enter(call, epoch, EntryStatus::kRejected, nullptr, kNoBadValue);
    wait_for_entries(call, epoch, entries);  // or a second rejection could overwrite this one
    if (threadIdx.x == 0) {
        call.state->bad_value = kNoBadValue;  // of a layout that led to nothing
        end_epoch(call, epoch);
    }
}

}  // namespace

void launch_exchange(const ExchangeParams& params, cudaStream_t stream) {
    exchange<<<1, kThreads, sizeof(int32_t) * params.num_local_experts, stream>>>(params);
    check(cudaGetLastError(), "launching the exchange kernel");
}

void launch_reject(const Call& call, const char* text, cudaStream_t stream) {
    RejectionText copy{};
    for (int i = 0; i < kTextBytes - 1 && text[i]; ++i) copy.characters[i] = text[i];
    reject<<<1, 32, 0, stream>>>(call, copy);
    check(cudaGetLastError(), "launching the reject kernel");
}

void prepare_exchange() {
    cudaFuncAttributes attributes;
    check(cudaFuncGetAttributes(&attributes, exchange), "loading a kernel");
    check(cudaFuncGetAttributes(&attributes, reject), "loading a kernel");
}

}  // namespace hpc_moe::cuda
