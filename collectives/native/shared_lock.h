// A lock in memory that processes share, zeroed before its first use. It says which rank holds it, so that who waits can
// ask whether that one is alive, and take the lock over from a rank that died with it.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "futex.h"
#include "wait.h"

namespace bitring {

// Numbers of ranks, of a node, that are known to have died: one's own knowledge, not shared.
using Dead = std::vector<bool>;

class SharedLock {
public:
    bool try_acquire(int rank) {
        std::uint32_t free = 0;
        return word_.compare_exchange_strong(free, name(rank), std::memory_order_acquire);
    }

    // Returns -1 when this rank has the lock; else, at `until` (nanoseconds), the rank that holds it.
    int acquire(int rank, std::uint64_t until, const Dead& dead) {
        const int spins = crowded() ? 0 : kSpins;
        for (int i = 0; i < spins; ++i) {
            if (word_.load(std::memory_order_relaxed) == 0 && try_acquire(rank)) return -1;
            pause_processor();
        }
        std::uint32_t seen = word_.load(std::memory_order_relaxed);
        for (;;) {
            const int holder = int(seen & ~kAwaited) - 1;
            if (seen == 0 || dead[std::size_t(holder)]) {
                // Others may wait, which this rank would not know otherwise.
                if (word_.compare_exchange_weak(seen, name(rank) | kAwaited, std::memory_order_acquire)) return -1;
                continue;
            }
            const std::uint64_t now = now_nanoseconds();
            if (now >= until) return holder;
            if ((seen & kAwaited) == 0 &&
                !word_.compare_exchange_weak(seen, seen | kAwaited, std::memory_order_relaxed)) {
                continue;
            }
            futex_wait(word_, seen | kAwaited, until - now);
            seen = word_.load(std::memory_order_relaxed);
        }
    }

    void release() {
        if ((word_.exchange(0, std::memory_order_release) & kAwaited) != 0) futex_wake(word_, 1);
    }

private:
    static constexpr std::uint32_t kAwaited = 1u << 31;
    static constexpr int kSpins = 200;
    static std::uint32_t name(int rank) { return std::uint32_t(rank) + 1; }

    std::atomic<std::uint32_t> word_;
};

}  // namespace bitring
