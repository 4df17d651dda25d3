// Whole numbers that the ranks of a node change together, under one lock, and a bell that wakes those who wait for a change.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

#include "shared_lock.h"

namespace bitring {

class SharedWords {
public:
    static constexpr std::size_t nbytes(std::size_t words) { return sizeof(Head) + words * sizeof(std::int64_t); }

    // `memory`, of nbytes(words), was zeroed before anybody used it, and outlives this. Rank `rank` of `size`.
    SharedWords(int rank, int size, char* memory)
        : rank_(rank), head_(*reinterpret_cast<Head*>(memory)), dead_(std::size_t(size)) {}

    // Both as SharedLock's; `seconds` from now on.
    int acquire(double seconds) { return head_.lock.acquire(rank_, now_nanoseconds() + nanoseconds(seconds), dead_); }
    void release() { head_.lock.release(); }

    // The lock is taken over from this rank, which has died.
    void bury(int rank) { dead_[std::size_t(rank)] = true; }

    // Where the words lie. They are changed by who holds the lock.
    std::int64_t* words() const { return reinterpret_cast<std::int64_t*>(&head_ + 1); }

    std::uint32_t bell() const { return head_.bell.load(std::memory_order_acquire); }

    void ring() {
        head_.bell.fetch_add(1, std::memory_order_seq_cst);
        if (head_.waiting.load(std::memory_order_seq_cst) != 0) futex_wake(head_.bell);
    }

    // Sleep until the bell has been rung since it was `seen`, or for so long. Returns whether it was.
    bool wait(std::uint32_t seen, double seconds) {
        const std::uint64_t until = now_nanoseconds() + nanoseconds(seconds);
        head_.waiting.fetch_add(1, std::memory_order_seq_cst);
        bool rung;
        for (;;) {
            rung = head_.bell.load(std::memory_order_seq_cst) != seen;
            const std::uint64_t now = now_nanoseconds();
            if (rung || now >= until) break;
            futex_wait(head_.bell, seen, until - now);
        }
        head_.waiting.fetch_sub(1, std::memory_order_seq_cst);
        return rung;
    }

private:
    // Of a rank that is killed while it waits `waiting` stays too high; then a ring costs a system call.
    struct alignas(128) Head {
        SharedLock lock;
        std::atomic<std::uint32_t> bell;
        std::atomic<std::uint32_t> waiting;
    };
    static std::uint64_t nanoseconds(double seconds) { return std::uint64_t(seconds * 1e9); }

    int rank_;
    Head& head_;
    Dead dead_;
};

}  // namespace bitring
