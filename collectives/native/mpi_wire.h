// Messages through the MPI library that the process has loaded already, whichever it is: nothing is linked.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "wire.h"

namespace bitring {

// The addresses of the library's functions. Throws std::runtime_error when `path` is not a loaded MPI library.
struct MpiLibrary {
    explicit MpiLibrary(const std::string& path);
    void* isend;
    void* irecv;
    void* testsome;
    void* test;
    void* start;
    void* iallreduce;
    void* ireduce;
    void* ibcast;
    void* iallgather;
    void* ireduce_scatter_block;
};

// `handle_size`: bytes of an MPI handle. 4: MPICH's ABI (handles are integers, MPI_STATUSES_IGNORE is 1); 8: Open MPI's
// and the MPI 5 standard's (pointers; 0). `comm` and `byte` are the values of the communicator and of MPI_BYTE.
// Requests are kept in `room` places, to which more are added where more messages are under way. Nothing is sent while there is unread news
// (news.h): it is held back until complete() finds none.
std::unique_ptr<Wire> make_mpi_wire(const MpiLibrary& library, int handle_size, std::uint64_t comm, std::uint64_t byte,
                                    int room);

}  // namespace bitring
