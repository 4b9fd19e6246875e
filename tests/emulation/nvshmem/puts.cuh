// Stands in for csrc/nvshmem/puts.cuh: what is put or signalled is delivered later, by other threads, in any order that
// fences leave open: a program that is right here needs no more than NVSHMEM promises.
#pragma once

#include <atomic>
#include <chrono>
#include <map>
#include <mutex>
#include <random>
#include <utility>

#include "cuda/low_latency.h"
#include "device.h"

namespace emulation {

// Of symmetric memory, one for each PE.
struct Region {
    uint8_t* begin;
    size_t bytes;
};

// A PE and a queue pair: between different ones there is no order.
using Way = std::pair<int, int>;

// A put, or a signal.
struct Parcel {
    uint8_t* to;
    const uint8_t* from;  // null: a signal, of `value`
    size_t bytes;
    uint64_t value;
    Way way;
    uint64_t number, after;  // comes behind all that go the same way and have numbers up to this
    std::chrono::steady_clock::time_point not_before;
};

// Those of the ranks of this process. One at a time.
class Network {
   public:
    Network(std::vector<Region> regions, bool has_fences) : has_fences(has_fences), regions_(std::move(regions)) {
        current = this;
        for (unsigned seed = 1; seed <= 2; ++seed) couriers_.emplace_back([this, seed] { carry(seed); });
    }

    ~Network() {
        ends_ = true;
        for (std::thread& courier : couriers_) courier.join();
    }

    static inline Network* current = nullptr;
    const bool has_fences;

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
        parcel.number = ++last_number_;
        parcel.not_before = std::chrono::steady_clock::now();
        // Some take as long as a kernel, so that what later ones send can overtake them.
        if (random_() % 16 == 0) parcel.not_before += std::chrono::milliseconds(random_() % 50);
        parcels_.push_back(parcel);
    }

    // The number of the last parcel of all.
    uint64_t last_number() {
        const std::lock_guard<std::mutex> lock(mutex_);
        return last_number_;
    }

    // Whether nothing goes this way any more.
    bool is_idle(Way way) {
        const std::lock_guard<std::mutex> lock(mutex_);
        return !is_under_way(way, ~uint64_t{0});
    }

   private:
    bool is_under_way(Way way, uint64_t up_to) const {
        const auto is_meant = [&](const Parcel& other) { return other.way == way && other.number <= up_to; };
        return std::any_of(parcels_.begin(), parcels_.end(), is_meant) ||
               std::any_of(carried_.begin(), carried_.end(), is_meant);
    }

    bool take(std::mt19937& random, Parcel& parcel) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (parcels_.empty() || random() % 4 == 0) return false;
        Parcel& drawn = parcels_[random() % parcels_.size()];
        if (is_under_way(drawn.way, drawn.after) || std::chrono::steady_clock::now() < drawn.not_before) return false;
        parcel = drawn;
        std::swap(drawn, parcels_.back());
        parcels_.pop_back();
        carried_.push_back(parcel);
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
            if (parcel.from) {
                memcpy(parcel.to, parcel.from, parcel.bytes);
            } else {
                __atomic_store_n(reinterpret_cast<uint64_t*>(parcel.to), parcel.value, __ATOMIC_RELEASE);
            }
            const std::lock_guard<std::mutex> lock(mutex_);
            const auto is_it = [&](const Parcel& other) { return other.number == parcel.number; };
            carried_.erase(std::find_if(carried_.begin(), carried_.end(), is_it));
        }
    }

    const std::vector<Region> regions_;
    std::vector<std::thread> couriers_;
    std::mutex mutex_;
    std::mt19937 random_;
    std::vector<Parcel> parcels_, carried_;
    uint64_t last_number_ = 0;
    std::atomic<bool> ends_{false};
};

// What this GPU thread's fences have put in order: up to which number, each way.
inline std::map<Way, uint64_t>& fences() {
    static thread_local std::map<Way, uint64_t> of_thread[kMaxThreads];
    return of_thread[self().index.x];
}

}  // namespace emulation

namespace hpc_moe::cuda {

struct Net {
    static constexpr bool kPuts = true, kCompletesRoutes = true;

    static void put(void* to, const void* from, size_t bytes, Route route) {
        emulation::Network& network = *emulation::Network::current;
        network.at(from, route.pe);  // must be symmetric, too
        const emulation::Way way(route.pe, route.queue);
        network.send(
            {network.at(to, route.pe), static_cast<const uint8_t*>(from), bytes, 0, way, 0, emulation::fences()[way]});
    }

    static void order(Route route) {
        emulation::Network& network = *emulation::Network::current;
        if (network.has_fences) emulation::fences()[{route.pe, route.queue}] = network.last_number();
    }

    static void signal(uint64_t* flag, uint64_t value, Route route) {
        emulation::Network& network = *emulation::Network::current;
        const emulation::Way way(route.pe, route.queue);
        auto* to = network.at(flag, route.pe);
        network.send({to, nullptr, sizeof value, value, way, 0, emulation::fences()[way]});
    }

    static void complete(Route route) {
        while (!emulation::Network::current->is_idle({route.pe, route.queue})) emulation::yield();
    }

    static bool has_come(const uint64_t* flag, uint64_t value) {
        emulation::yield();
        return __atomic_load_n(flag, __ATOMIC_ACQUIRE) >= value;
    }
};

}  // namespace hpc_moe::cuda
