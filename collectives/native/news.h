// Whether this process has been told something that it has not read yet, such as the death of a rank.
//
// An MPI library may crash when it sends to a process that has died, so whoever is about to send looks here first. The
// host of the one that died closes a connection to this process when it closes the library's own (runtime/contact.py):
// what the library may have seen can be seen here, too. Another thread may read it, for another communicator: then a
// death is news to every thread until it has looked whom it may still send to.
#pragma once

#include <atomic>
#include <cstdint>

namespace bitring {

class News {
public:
    // This process's.
    static News& of_process();

    // What comes can be read from `descriptor`, of an epoll; -1: nothing will come.
    void comes_to(int descriptor) { descriptor_.store(descriptor, std::memory_order_relaxed); }

    // A process has been found to be dead.
    void tell_death() { deaths_.fetch_add(1); }

    // This thread is about to look which processes are dead, and will send to none of them.
    void heed_deaths();

    // Whether any has come by now, or a death has been told that this thread has not heeded. A call of the system, which
    // takes a fraction of a microsecond.
    bool unread();

    // As unread(), for those who ask over and over: what has come in the last ten microseconds it may miss.
    bool unread_lately();

private:
    std::atomic<int> descriptor_{-1};
    bool unheeded() const;

    std::atomic<std::uint64_t> looked_{0};  // when there was none
    std::atomic<std::uint64_t> deaths_{0};
};

}  // namespace bitring
