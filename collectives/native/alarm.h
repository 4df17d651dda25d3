// What ends the nap of a thread that waits for messages: the epolls of this process, that of the MPI library's sockets
// among them. A poll of an epoll says that there is something, and takes nothing away. Where the library has none, a nap
// lasts as long as it was to.
#pragma once

#include <poll.h>

#include <vector>

namespace bitring {

class Alarm {
public:
    // Of the epolls that the process had when the first one was made. `caller`: a descriptor that ends a sleep, too; -1: none.
    explicit Alarm(int caller = -1);

    // Sleep until it rings, and for so long at most.
    void sleep(long nanoseconds);

    // Whether what comes and goes meanwhile has room in the kernel: then one may sleep through parts of messages.
    static bool may_sleep_through();

    // Sleep for so long whatever comes; only the caller ends it.
    void sleep_through(long nanoseconds);

    // Whether it rang in the last sleep.
    bool rang() const { return rang_; }

    // Whether messages had come by the end of the sleep. An epoll that rings all the time, and none have, is left out.
    void answer(bool came);

    // Whether it has rung for messages of late: then it is good to sleep for long.
    static bool trusted();

private:
    static constexpr int kInVain = 64;
    static constexpr int kTrust = 64;

    std::vector<pollfd> epolls_;
    int caller_;
    bool called_ = false;
    bool rang_ = false;
    bool at_once_ = false;  // it rang before there was a sleep
    int in_vain_ = 0;
};

}  // namespace bitring
