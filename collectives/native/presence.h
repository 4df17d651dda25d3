// Whether another process of this node is alive, still part of the job, or gone.
//
// Each process holds a lock on one byte of an anonymous file. The system gives the lock back when the process ends, in
// whatever way, and others can see that; no process number is trusted, which may be used again or mean nothing here.
#pragma once

#include <string>

#include "memory.h"

namespace bitring {

class Presence {
public:
    // This process's; one of each process is enough. Throws std::system_error.
    static Presence make(const std::string& name);

    // Another process's, which has made its own.
    static Presence open(int pid, int descriptor, const std::string& name);

    enum class Liveness : int { here, left, dead };

    // From another process: it runs; it has said that it leaves; it has ended without a word.
    Liveness liveness() const;

    // This process will not take part in anything any more, though it may run on.
    void leave();

    Memory& memory() { return memory_; }

private:
    Memory memory_;
};

}  // namespace bitring
