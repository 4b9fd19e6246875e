// Stands in for csrc/nvshmem/puts.cuh: what is put is copied later, by other threads, in any order that a signal leaves
// open, and some that a fence would not: a program that is right here needs no more than NVSHMEM promises.
#pragma once

#include <atomic>
#include <mutex>
#include <random>

#include "cuda/low_latency.h"
#include "device.h"

namespace emulation {

// Of symmetric memory, one for each PE.
struct Region {
    uint8_t* begin;
    size_t bytes;
};

struct Put {
    uint8_t* to;
    const uint8_t* from;
    size_t bytes;
    hpc_moe::cuda::Route route;
};

// What a thread has put, and the signal behind that.
struct Parcel {
    std::vector<Put> puts;
    uint64_t* flag;
    uint64_t value;
};

// Those of the ranks of this process. One at a time.
class Network {
   public:
    explicit Network(std::vector<Region> regions) : regions_(std::move(regions)) {
        current = this;
        for (unsigned seed = 1; seed <= 2; ++seed) couriers_.emplace_back([this, seed] { carry(seed); });
    }

    ~Network() {
        ends_ = true;
        for (std::thread& courier : couriers_) courier.join();
    }

    static inline Network* current = nullptr;

    // The place in a PE's region that `address` is in its own.
    uint8_t* at(const void* address, int pe) const {
        for (const Region& region : regions_) {
            const ptrdiff_t offset = static_cast<const uint8_t*>(address) - region.begin;
            if (offset >= 0 && offset < static_cast<ptrdiff_t>(region.bytes)) return regions_[pe].begin + offset;
        }
        fprintf(stderr, "not in symmetric memory: %p\n", address);
        abort();
    }

    void send(Parcel parcel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        parcels_.push_back(std::move(parcel));
    }

    bool is_idle() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return parcels_.empty() && num_carried_ == 0;
    }

   private:
    bool take(std::mt19937& random, Parcel& parcel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (parcels_.empty() || random() % 4 == 0) return false;
        std::swap(parcels_[random() % parcels_.size()], parcels_.back());
        parcel = std::move(parcels_.back());
        parcels_.pop_back();
        ++num_carried_;
        return true;
    }

    void carry(unsigned seed) {
        std::mt19937 random(seed);
        Parcel parcel;
        while (!ends_) {
            if (!take(random, parcel)) {
                std::this_thread::sleep_for(std::chrono::microseconds(random() % 100));
                continue;
            }
            std::shuffle(parcel.puts.begin(), parcel.puts.end(), random);
            for (const Put& put : parcel.puts) memcpy(put.to, put.from, put.bytes);
            // Signals to a word grow. If the later one overtook, it stays.
            uint64_t old = __atomic_load_n(parcel.flag, __ATOMIC_RELAXED);
            while (old < parcel.value && !__atomic_compare_exchange_n(parcel.flag, &old, parcel.value, false,
                                                                      __ATOMIC_RELEASE, __ATOMIC_RELAXED)) {
            }
            --num_carried_;
        }
    }

    const std::vector<Region> regions_;
    std::vector<std::thread> couriers_;
    std::mutex mutex_;
    std::vector<Parcel> parcels_;
    std::atomic<int> num_carried_{0};
    std::atomic<bool> ends_{false};
};

// What this GPU thread has put since its last signal.
inline std::vector<Put>& pending() {
    static thread_local std::vector<Put> of_thread[kMaxThreads];
    return of_thread[self().index.x];
}

}  // namespace emulation

namespace hpc_moe::cuda {

struct Net {
    static constexpr bool kPuts = true;

    static void put(void* to, const void* from, size_t bytes, Route route) {
        const emulation::Network& network = *emulation::Network::current;
        network.at(from, route.pe);  // must be symmetric, too
        emulation::pending().push_back({network.at(to, route.pe), static_cast<const uint8_t*>(from), bytes, route});
    }

    static void order(Route) {}

    static void signal(uint64_t* flag, uint64_t value, Route route) {
        emulation::Network& network = *emulation::Network::current;
        for (const emulation::Put& put : emulation::pending()) {
            if (put.route.pe == route.pe && put.route.queue == route.queue) continue;
            fprintf(stderr, "a signal is not ordered behind what went another way\n");
            abort();
        }
        auto* to = reinterpret_cast<uint64_t*>(network.at(flag, route.pe));
        network.send({std::move(emulation::pending()), to, value});
        emulation::pending().clear();
    }

    static void complete() {
        while (!emulation::Network::current->is_idle()) emulation::yield();
    }

    static bool has_come(const uint64_t* flag, uint64_t value) {
        emulation::yield();
        return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value;
    }
};

}  // namespace hpc_moe::cuda
