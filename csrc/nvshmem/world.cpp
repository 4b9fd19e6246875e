#include "nvshmem/world.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <nvshmem_host.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "cuda/check.h"

namespace hpc_moe::nvshmem {
namespace {

void check(int status, const char* what) {
    if (status != 0) throw std::runtime_error(std::string(what) + " failed with status " + std::to_string(status));
}

// NVSHMEM uses the thread's current device, and puts its start off until later where none has been chosen.
void choose_device(int device) {
    if (device >= 0) cuda::check(cudaSetDevice(device), "choosing the device");
}

// NVSHMEM's functions end the process where it is not running.
void require_running(const char* what) {
    if (!is_running()) throw std::runtime_error(std::string(what) + ": NVSHMEM is not running in this process");
}

// What nvshmemx_qp_create has allocated; not to be freed before NVSHMEM's end.
std::vector<void*> handle_arrays;

}  // namespace

Version built_version() {
    return {NVSHMEM_VENDOR_MAJOR_VERSION, NVSHMEM_VENDOR_MINOR_VERSION, NVSHMEM_VENDOR_PATCH_VERSION};
}

Version loaded_version() {
    Version version{};
    nvshmemx_vendor_get_version_info(&version[0], &version[1], &version[2]);
    return version;
}

std::string built_path() { return HPC_MOE_NVSHMEM_DIR; }

std::string loaded_path() {
    Dl_info info{};
    if (!dladdr(reinterpret_cast<void*>(&nvshmemx_get_uniqueid), &info) || !info.dli_fname) return "";
    return info.dli_fname;
}

std::map<std::string, std::optional<std::string>> environment(const std::vector<std::string>& names) {
    std::map<std::string, std::optional<std::string>> values;
    for (const std::string& name : names) {
        const char* value = std::getenv(name.c_str());
        values[name] = value ? std::optional<std::string>(value) : std::nullopt;
    }
    return values;
}

UniqueId get_unique_id() {
    nvshmemx_uniqueid_t id = NVSHMEMX_UNIQUEID_INITIALIZER;
    check(nvshmemx_get_uniqueid(&id), "nvshmemx_get_uniqueid");
    UniqueId bytes;
    static_assert(sizeof id == sizeof bytes);
    std::memcpy(bytes.data(), &id, bytes.size());
    return bytes;
}

void init(const UniqueId& unique_id, int pe, int num_pes, int device) {
    if (is_running()) throw std::runtime_error("NVSHMEM is running in this process already");
    choose_device(device);
    nvshmemx_uniqueid_t id;
    std::memcpy(&id, unique_id.data(), sizeof id);
    nvshmemx_init_attr_t attributes = NVSHMEMX_INIT_ATTR_INITIALIZER;
    check(nvshmemx_set_attr_uniqueid_args(pe, num_pes, &id, &attributes), "nvshmemx_set_attr_uniqueid_args");
    // nvshmemx_init_attr is an inline function of the header, which ends the process if this one reports a failure.
    int provided = 0;
    const Version built = built_version();
    const int status = nvshmemi_init_thread(NVSHMEM_THREAD_SERIALIZED, &provided, NVSHMEMX_INIT_WITH_UNIQUEID,
                                            &attributes, {built[0], built[1], built[2]});
    check(status, "starting NVSHMEM");
    // 3.4.5 returns 0 even if it got no further than to know its peers, and ends the process in a later call.
    if (!is_running()) {
        throw std::runtime_error("starting NVSHMEM failed: it stopped at init status " +
                                 std::to_string(nvshmemx_init_status()));
    }
    if (my_pe() != pe || n_pes() != num_pes) {
        throw std::runtime_error("NVSHMEM started as PE " + std::to_string(my_pe()) + " of " + std::to_string(n_pes()) +
                                 " instead of PE " + std::to_string(pe) + " of " + std::to_string(num_pes));
    }
}

bool is_running() {
    const int status = nvshmemx_init_status();
    return status >= NVSHMEM_STATUS_IS_INITIALIZED && status != NVSHMEM_STATUS_INVALID;
}

void finalize(int device) {
    require_running("finalize");
    choose_device(device);
    nvshmem_finalize();
    for (void* array : handle_arrays) std::free(array);
    handle_arrays.clear();
}

int my_pe() {
    require_running("my_pe");
    return nvshmem_my_pe();
}

int n_pes() {
    require_running("n_pes");
    return nvshmem_n_pes();
}

void* malloc(size_t num_bytes, int device) {
    require_running("malloc");
    choose_device(device);
    return nvshmem_malloc(num_bytes);
}

void free(void* memory, int device) {
    require_running("free");
    choose_device(device);
    nvshmem_free(memory);
}

std::vector<int> create_queue_pairs([[maybe_unused]] int count, int device) {
    require_running("create_queue_pairs");
    choose_device(device);
#if NVSHMEM_VENDOR_VERSION >= 30519
    nvshmemx_qp_handle_t* handles = nullptr;
    const int status = nvshmemx_qp_create(count, &handles);
    if (handles) handle_arrays.push_back(handles);
    if (status != 0 || !handles) {
        throw std::runtime_error("nvshmemx_qp_create failed with status " + std::to_string(status) + " to make " +
                                 std::to_string(count) + " queue pairs");
    }
    return std::vector<int>(handles, handles + count);
#else
    return {};
#endif
}

void* ptr(const void* memory, int pe) {
    require_running("ptr");
    if (pe < 0 || pe >= n_pes()) throw std::runtime_error("ptr: there is no PE " + std::to_string(pe));
    return nvshmem_ptr(memory, pe);
}

}  // namespace hpc_moe::nvshmem
