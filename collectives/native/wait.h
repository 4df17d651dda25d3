// How a thread waits: it spins for as long as an answer usually takes, then gives way, then naps.
#pragma once

#include <sched.h>
#include <sys/prctl.h>
#include <time.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "alarm.h"

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

// Whether this process shares its node with other ranks: then not all that it waits for is a message. Set as crowded().
inline bool& has_neighbours() {
    static bool value = false;
    return value;
}

// Call rest() whenever there is nothing to do, moved() when there was.
//
// Where messages are waited for, a look at the network that takes long has found a part of one. While parts come in, the
// thread need not look for more before the alarm rings. Once they have been coming for a while, and slowly, it sleeps
// through a few of them: much at once costs a look, and the kernel, hardly more than little does.
class Patience {
public:
    // `gentle`: a thread beside a training loop, which must not take its core; spins are few and naps come early.
    // `network`: messages are waited for. A look at the network takes longer than to give way to nobody, and whoever is to
    // send them may need this core.
    // `caller`: a descriptor that ends a nap, where messages are waited for.
    explicit Patience(bool gentle, bool network = false, int caller = -1)
        : gentle_(gentle), network_(network), caller_(caller), spins_(network ? 0 : crowded() ? kCrowded : gentle ? kFew : kSpins) {}

    void moved() {
        idle_ = 0;
        since_ = 0;
        if (network_) found(now_nanoseconds());
        if (!flows_) nap_ = kFirstNap;
    }

    void rest() {
        ++idle_;
        if (idle_ <= spins_) {
            pause_processor();
            return;
        }
        const std::uint64_t now = now_nanoseconds();
        if (since_ == 0) since_ = now;
        if (network_ && found(now)) return;  // there may be more
        // Other ranks may need this core to send what is waited for.
        if (now - since_ < stay()) {
            sched_yield();
        } else {
            nap();
        }
        if (network_) looked_ = now_nanoseconds();
    }

    // Nanoseconds since rest() began to give way; 0 before.
    std::uint64_t idle_nanoseconds() const { return since_ == 0 ? 0 : now_nanoseconds() - since_; }

private:
    // Whether the look that ends now has found something.
    bool found(std::uint64_t now) {
        const std::uint64_t took = looked_ == 0 ? 0 : now - looked_;
        const bool something = took > kVainLook;
        looked_ = now;
        if (napped_ != 0) {
            if (!deaf_) {
                alarm_->answer(something);
                // Where looks take a good part of the time, it is not the network that is slow.
                if (something && took * kPart > napped_) nap_ = std::max(nap_ / 4, kFirstNap);
            }
            slow_ = something && took * kSlow < napped_;
            napped_ = 0;
        }
        if (something) {
            if (now - came_ > kGap) flowed_ = now;
            came_ = now;
        }
        flows_ = (flows_ || something) && Alarm::trusted();
        return something;
    }

    std::uint64_t stay() const {
        // After a short nap there was much: the next part is near.
        if (flows_) return has_neighbours() || nap_ == kFirstNap ? kShortStay : 0;
        return gentle_ ? kShortStay : kStay;
    }

    // Nanoseconds to sleep whatever comes in; 0: until something does. A part of the time for which parts have been coming,
    // for at the end of the last message they are lost: not of that for which a late rank was waited for, whose messages
    // may be short ones that others wait for in turn.
    long deafness(std::uint64_t now) const {
        if (!flows_ || !slow_ || has_neighbours() || !Alarm::may_sleep_through()) return 0;
        const auto most = long(std::min<std::uint64_t>((now - flowed_) / kLost, kDeaf));
        return most < kShortDeaf ? 0 : most;
    }

    void nap() {
        if (!naps_) prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);  // the default makes every nap 50 microseconds longer
        naps_ = true;
        if (network_) {
            if (!alarm_) alarm_.emplace(caller_);
            const std::uint64_t begin = now_nanoseconds();
            const long deaf = deafness(begin);
            deaf_ = deaf > 0;
            deaf_ ? alarm_->sleep_through(deaf) : alarm_->sleep(nap_);
            napped_ = now_nanoseconds() - begin;
            if (deaf_) return;
        } else {
            const timespec nap{0, nap_};
            nanosleep(&nap, nullptr);
        }
        // What has taken long is likely to take as long again: a slow network is looked at rarely, a fast one often.
        nap_ = std::min(2 * nap_, gentle_ ? kGentleNap : flows_ && !has_neighbours() ? kFlowNap : kNap);
    }

    static constexpr int kSpins = 400;
    static constexpr int kFew = 50;
    static constexpr int kCrowded = 4;
    static constexpr long kFirstNap = 20000;
    static constexpr long kNap = 80000;
    static constexpr long kGentleNap = 500000;
    static constexpr long kFlowNap = 1000000;
    static constexpr std::uint64_t kStay = 1000000;
    static constexpr std::uint64_t kShortStay = 20000;
    static constexpr std::uint64_t kVainLook = 4000;  // takes less
    static constexpr std::uint64_t kPart = 8;
    static constexpr std::uint64_t kSlow = 3;  // a network of 10 Gbit/s is not
    static constexpr std::uint64_t kGap = 4000000;  // a network that is slow has parts more often
    static constexpr std::uint64_t kLost = 64;
    static constexpr std::uint64_t kDeaf = 2000000;
    static constexpr long kShortDeaf = 250000;
    bool gentle_, network_;
    int caller_, spins_;
    bool naps_ = false;
    bool flows_ = false;  // parts of messages have come, and more will ring
    bool slow_ = false;   // what the last nap brought was looked at in a small part of its time
    bool deaf_ = false;   // that nap did not end when something came
    std::uint64_t came_ = 0;    // when the last part had
    std::uint64_t flowed_ = 0;  // when the first part had, since nothing came for kGap
    long nap_ = kFirstNap;
    int idle_ = 0;
    std::uint64_t since_ = 0;
    std::uint64_t looked_ = 0;  // when the last look began
    std::uint64_t napped_ = 0;  // how long the nap before it was
    std::optional<Alarm> alarm_;
};

}  // namespace bitring
