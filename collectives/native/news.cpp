#include "news.h"

#include <poll.h>

#include "wait.h"

namespace bitring {

namespace {

constexpr std::uint64_t kOftenNanoseconds = 10000;

// Where many share a core, the kernel takes it from a thread at the end of a call of the system: of this one, too, and what
// was found is then old. It looks so often at most.
constexpr int kLooks = 8;

thread_local std::uint64_t deaths_heeded = 0;

}  // namespace

News& News::of_process() {
    static News news;
    return news;
}

void News::heed_deaths() { deaths_heeded = deaths_.load(); }

bool News::unheeded() const { return deaths_.load(std::memory_order_relaxed) != deaths_heeded; }

bool News::unread() {
    if (unheeded()) return true;
    pollfd epoll{descriptor_.load(std::memory_order_relaxed), POLLIN, 0};
    for (int k = 0; k < kLooks; ++k) {
        const std::uint64_t before = now_nanoseconds();
        if (epoll.fd >= 0 && poll(&epoll, 1, 0) > 0) {
            looked_.store(0, std::memory_order_relaxed);  // it will be read soon, and is to be seen as such at once
            return true;
        }
        looked_.store(before, std::memory_order_relaxed);
        if (now_nanoseconds() - before < kOftenNanoseconds) break;
    }
    return false;
}

bool News::unread_lately() {
    return unheeded() || (now_nanoseconds() - looked_.load(std::memory_order_relaxed) > kOftenNanoseconds && unread());
}

}  // namespace bitring
