// Waiting for a word in memory that processes share, and waking those who wait; the system does both.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>

namespace bitring {

// Sleeps while `word` is `seen`, until woken or for so long; may return for no reason at all.
inline void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t seen, std::uint64_t nanoseconds) {
    const timespec limit{time_t(nanoseconds / 1000000000u), long(nanoseconds % 1000000000u)};
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAIT, seen, &limit, nullptr, 0);
}

inline void futex_wake(std::atomic<std::uint32_t>& word, int most = INT_MAX) {
    syscall(SYS_futex, reinterpret_cast<std::uint32_t*>(&word), FUTEX_WAKE, most, nullptr, nullptr, 0);
}

}  // namespace bitring
