// A collective under way, as a state machine: whoever has time takes it further.
#pragma once

#include <cstdint>

namespace bitring {

enum class Status : std::uint8_t {
    waiting,   // nothing can be done until a peer has done something
    moved,     // something was done, and there may be more
    done,
    disagree,  // over, with nothing exchanged: the ranks do not mean the same thing
    failed     // over: error() says why
};

inline bool is_over(Status status) { return status >= Status::done; }

class Operation {
public:
    virtual ~Operation() = default;

    // Begin a run; none may be under way.
    void begin() {
        status_ = Status::moved;
        start();
    }

    // Do what can be done now, in pieces of about a millisecond.
    Status advance() {
        status_ = step();
        moves_ += status_ != Status::waiting;
        return status_;
    }

    // What advance() said last.
    Status status() const { return status_; }

    // A rank, as the operation numbers them, that a waiting operation waits for; -1: none.
    virtual int awaited() const = 0;

    // The MPI library's error code, or another number than 0 where the operation has a reason() of its own.
    virtual int error() const { return 0; }

    // Whether it calls the MPI library: whoever waits for that one's lock must not hold Python's.
    virtual bool calls_library() const { return false; }

    // What has gone wrong, in words, when it is none of the library's errors; else null.
    virtual const char* reason() const { return nullptr; }

    // Grows whenever something was done.
    std::uint64_t moves() const { return moves_; }

protected:
    virtual void start() = 0;
    virtual Status step() = 0;

private:
    Status status_ = Status::done;
    std::uint64_t moves_ = 0;
};

}  // namespace bitring
