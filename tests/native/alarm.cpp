// What ends a nap: an epoll that has something to tell, as long as that is what was waited for.
#include "alarm.h"

#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>

#include "wait.h"

using namespace bitring;

namespace {

constexpr long kShort = 1000, kLong = 900000000, kThrough = 2000000;
constexpr int kMany = 1000000;

void check(bool ok, const char* message) {
    if (ok) return;
    std::fprintf(stderr, "%s\n", message);
    std::_Exit(1);
}

// Of an event that is told until it is read.
struct Event {
    int descriptor = eventfd(0, EFD_NONBLOCK), epoll = epoll_create1(0);
    Event() {
        epoll_event event{};
        event.events = EPOLLIN;
        check(epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event) == 0, "no epoll");
    }
    void set() const {
        const std::uint64_t one = 1;
        check(write(descriptor, &one, sizeof one) == sizeof one, "nothing written");
    }
    void clear() const {
        std::uint64_t value;
        check(read(descriptor, &value, sizeof value) == sizeof value, "nothing to read");
    }
};

}  // namespace

int main() {
    const Event messages, others;
    Alarm alarm;
    alarm.sleep(kShort);
    check(!alarm.rang(), "nothing has come");
    alarm.answer(false);
    check(!Alarm::trusted(), "trusted, and has never rung");
    messages.set();
    alarm.sleep(kLong);
    check(alarm.rang(), "slept on when a message had come");
    alarm.answer(true);
    check(Alarm::trusted(), "it has rung for a message");
    const std::uint64_t begin = now_nanoseconds();
    alarm.sleep_through(kThrough);
    check(now_nanoseconds() - begin >= std::uint64_t(kThrough), "a message has ended a sleep through messages");
    messages.clear();
    alarm.sleep(kShort);
    check(!alarm.rang(), "rang for what was read");
    for (int k = 0; Alarm::trusted(); ++k) {
        check(k < kMany, "trusted for ever, and rings for nothing");
        alarm.answer(true);
    }
    // One that nobody reads is left out after a while; the other one is not.
    others.set();
    for (int k = 0; alarm.rang() || k == 0; ++k) {
        check(k < kMany, "listens to one that rings all the time");
        alarm.sleep(kShort);
        alarm.answer(false);
    }
    Alarm another;
    another.sleep(kShort);
    check(!another.rang(), "a new one listens to what was left out");
    messages.set();
    another.sleep(kLong);
    check(another.rang(), "listens to nothing any more");
    std::puts("ok");
}
