// Messages between ranks: what an execution needs of an MPI library.
#pragma once

#include <cstddef>

namespace bitring {

class Wire {
public:
    virtual ~Wire() = default;

    // Start sending or receiving `nbytes` at `memory`; complete() will name `message`. Returns an MPI error code or 0.
    // What cannot be sent yet may be sent by complete().
    virtual int start(bool sends, void* memory, std::size_t nbytes, int peer, int tag, int message) = 0;

    // The messages that completed since the last call; `count` of them, never more than `room`. An error code or 0.
    virtual int complete(int* messages, int room, int* count) = 0;
};

}  // namespace bitring
