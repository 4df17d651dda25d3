#include "alarm.h"

#include <dirent.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <string>

#include "wait.h"

namespace bitring {

namespace {

constexpr std::uint64_t kAtOnceNanoseconds = 5000;
constexpr std::size_t kMost = 16;
constexpr long kHeld = 1 << 20;  // bytes of a connection: eight milliseconds at 1 Gbit/s

std::atomic<int> trust{0};
std::mutex mutex;  // of what all use

std::vector<pollfd> epolls_of_process() {
    std::vector<pollfd> found;
    DIR* folder = opendir("/proc/self/fd");
    if (folder == nullptr) return found;
    while (const dirent* entry = readdir(folder)) {
        char target[64];
        const ssize_t length = readlinkat(dirfd(folder), entry->d_name, target, sizeof target);
        if (length < 0 || std::string(target, std::size_t(length)) != "anon_inode:[eventpoll]") continue;
        if (found.size() < kMost) found.push_back({std::atoi(entry->d_name), POLLIN, 0});
    }
    closedir(folder);
    return found;
}

// Whether sockets may hold so much, by what the kernel says of their memory ("tcp_rmem", "tcp_wmem"): least, usual, most.
bool sockets_hold(const char* which, long nbytes) {
    std::ifstream file(std::string("/proc/sys/net/ipv4/") + which);
    long least = 0, usual = 0, most = 0;
    return bool(file >> least >> usual >> most) && most >= nbytes;
}

std::vector<pollfd>& everyones() {
    static std::vector<pollfd> epolls = epolls_of_process();
    return epolls;
}

}  // namespace

Alarm::Alarm(int caller) : caller_(caller) {
    const std::lock_guard<std::mutex> lock(mutex);
    epolls_ = everyones();
}

bool Alarm::trusted() { return trust.load(std::memory_order_relaxed) > 0; }

bool Alarm::may_sleep_through() {
    static const bool holds = sockets_hold("tcp_rmem", kHeld) && sockets_hold("tcp_wmem", kHeld);
    return holds && trusted();
}

void Alarm::sleep(long nanoseconds) {
    const std::uint64_t begin = now_nanoseconds();
    const timespec most{0, nanoseconds};
    epolls_.push_back({caller_, POLLIN, 0});  // -1 is passed over
    const int ready = ppoll(epolls_.data(), nfds_t(epolls_.size()), &most, nullptr);
    called_ = ready > 0 && epolls_.back().revents != 0;
    epolls_.pop_back();
    rang_ = ready > int(called_);
    at_once_ = rang_ && now_nanoseconds() - begin < kAtOnceNanoseconds;
}

void Alarm::sleep_through(long nanoseconds) {
    const timespec most{0, nanoseconds};
    pollfd caller{caller_, POLLIN, 0};
    ppoll(&caller, 1, &most, nullptr);
}

void Alarm::answer(bool came) {
    if (called_) return;
    if (came && rang_) {
        trust.store(kTrust, std::memory_order_relaxed);
    } else if (came && trusted()) {
        trust.fetch_sub(1, std::memory_order_relaxed);
    }
    in_vain_ = at_once_ && !came ? in_vain_ + 1 : 0;
    if (in_vain_ < kInVain) return;
    in_vain_ = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    std::vector<pollfd>& all = everyones();
    for (const pollfd& each : epolls_) {
        if (each.revents == 0) continue;
        const auto same = [&](const pollfd& other) { return other.fd == each.fd; };
        all.erase(std::remove_if(all.begin(), all.end(), same), all.end());
    }
    epolls_ = all;
}

}  // namespace bitring
