// NVSHMEM as a process sees it: its version, its start and end, and its symmetric memory.
//
// Thin: a function here calls one of NVSHMEM's, and turns what that one would end the process for into an exception.
// Who starts with whom, and when, is decided in Python (hpc_moe/_backends/cuda/nvshmem.py). It knows neither torch nor
// MPI. Errors are std::runtime_error. NVSHMEM says on stderr why something failed; that is for the caller to catch.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace hpc_moe::nvshmem {

using Version = std::array<int, 3>;  // major, minor, patch
using UniqueId = std::array<uint8_t, 128>;

// --- which NVSHMEM

// Of the headers, and of libnvshmem_device.a, which is linked in.
Version built_version();
// The folder of its include and lib at build time.
std::string built_path();
// Of the libnvshmem_host that this process has loaded. It may be another than that of the build: the loader knows
// libraries by their short name only, and torch brings one, too.
Version loaded_version();
std::string loaded_path();

// What these environment variables are for C code, and so for NVSHMEM.
std::map<std::string, std::optional<std::string>> environment(const std::vector<std::string>& names);

// --- start and end

// For one of the processes that start together. NVSHMEM reads its environment variables here, or in `init`.
UniqueId get_unique_id();
// Starts NVSHMEM as PE `pe` of `num_pes` on this GPU, which becomes the thread's current one (-1: the one that is).
// Collective over the PEs; blocks without a limit.
void init(const UniqueId& unique_id, int pe, int num_pes, int device);
// Whether it has been started, and not been ended since.
bool is_running();
// Ends it. Collective over all PEs, blocks until all have come, without a limit. device: as for `init`.
void finalize(int device);

// --- while it runs; each throws if it does not. device: as for `init`

int my_pe();
int n_pes();
// Symmetric memory, of the same size on all PEs; null where a heap of fixed size has no room. For one that grows the
// GPU must have it: 3.4.5 ends the process otherwise. Collective over all PEs, blocks until all have come, without a
// limit.
void* malloc(size_t num_bytes, int device);
void free(void* memory, int device);
// Handles of queue pairs for the kernels that put, each of which serves all PEs; none if this is before NVSHMEM 3.5.19.
// They last until its end: there is no call that gives them back. Where they would be of no use, between peers on
// NVLink for one, all are NVSHMEM's default. Collective over all PEs, with the same count; blocks as `malloc` does.
std::vector<int> create_queue_pairs(int count, int device);
// Where this process sees the memory that `memory` is on another PE, null if it can be reached through the network
// only.
void* ptr(const void* memory, int pe);

}  // namespace hpc_moe::nvshmem
