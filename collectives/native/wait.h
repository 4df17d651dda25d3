// How a thread waits: it spins for as long as an answer usually takes, then gives way, then naps.
#pragma once

#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <cstdint>

namespace bitring {

inline std::uint64_t now_nanoseconds() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return std::uint64_t(t.tv_sec) * 1000000000u + std::uint64_t(t.tv_nsec);
}

inline void pause_processor() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Whether this node runs more ranks than this process has cores: then to spin is to keep a core from the rank that is
// waited for. Set once, before anything waits.
inline bool& crowded() {
    static bool value = false;
    return value;
}

// Call rest() whenever there is nothing to do, moved() when there was.
class Patience {
public:
    // `gentle`: a thread beside a training loop, which must not take its core; spins are few and naps come early.
    // `network`: messages are waited for. A look at the network takes longer than to give way to nobody, and whoever is to
    // send them may need this core.
    explicit Patience(bool gentle, bool network = false)
        : gentle_(gentle), spins_(network ? 0 : crowded() ? kCrowded : gentle ? kFew : kSpins) {}

    void moved() {
        idle_ = 0;
        nap_nanoseconds_ = kFirstNap;
        since_ = 0;
    }

    void rest() {
        ++idle_;
        if (idle_ <= spins_) {
            pause_processor();
            return;
        }
        if (since_ == 0) since_ = now_nanoseconds();
        // Other ranks may need this core to send what is waited for.
        if (now_nanoseconds() - since_ < (gentle_ ? 20000u : 1000000u)) {
            sched_yield();
            return;
        }
        if (!naps_) prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // the default makes every nap 50 microseconds longer
        naps_ = true;
        // What has taken long is likely to take as long again: a slow network is looked at rarely, a fast one often.
        nap_nanoseconds_ = std::min(2 * nap_nanoseconds_, gentle_ ? kGentleNap : kNap);
        timespec nap{0, nap_nanoseconds_};
        nanosleep(&nap, nullptr);
    }

    // Nanoseconds since rest() began to give way; 0 before.
    std::uint64_t idle_nanoseconds() const { return since_ == 0 ? 0 : now_nanoseconds() - since_; }

private:
    static constexpr int kSpins = 400;
    static constexpr int kFew = 50;
    static constexpr int kCrowded = 4;
    static constexpr long kFirstNap = 10000;
    static constexpr long kNap = 80000;
    static constexpr long kGentleNap = 500000;
    bool gentle_;
    int spins_;
    bool naps_ = false;
    long nap_nanoseconds_ = kFirstNap;
    int idle_ = 0;
    std::uint64_t since_ = 0;
};

}  // namespace bitring
