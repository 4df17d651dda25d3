#include "news.h"

#include <poll.h>

#include "wait.h"

namespace bitring {

namespace {

constexpr std::uint64_t kOftenNanoseconds = 10000;

}  // namespace

News& News::of_process() {
    static News news;
    return news;
}

bool News::unread() {
    pollfd epoll{descriptor_.load(std::memory_order_relaxed), POLLIN, 0};
    if (epoll.fd < 0 || poll(&epoll, 1, 0) <= 0) {
        looked_.store(now_nanoseconds(), std::memory_order_relaxed);
        return false;
    }
    looked_.store(0, std::memory_order_relaxed);  // it will be read soon, and is to be seen as such at once
    return true;
}

bool News::unread_lately() {
    return now_nanoseconds() - looked_.load(std::memory_order_relaxed) > kOftenNanoseconds && unread();
}

}  // namespace bitring
