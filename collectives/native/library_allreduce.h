// The MPI library's own AllReduce in place, as an operation. It is not the blocking one, so that ranks that are gone are
// noticed.
#pragma once

#include <cstdint>
#include <memory>

#include "mpi_wire.h"
#include "operation.h"

namespace bitring {

class LibraryAllreduce : public Operation {
public:
    // Work on the values at `buffer` from the next begin() on.
    void bind(void* buffer) { buffer_ = buffer; }

    int awaited() const override { return -1; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }

protected:
    void* buffer_ = nullptr;
    int error_ = 0;
};

// Values of MPI handles, and of MPI_IN_PLACE. The library is not called while there is unread news.
struct LibraryCall {
    std::uint64_t comm;
    std::uint64_t datatype;
    std::uint64_t op;
    std::int64_t in_place;
    int count;
};

std::shared_ptr<LibraryAllreduce> make_library_allreduce(const MpiLibrary& library, int handle_size,
                                                         const LibraryCall& call);

}  // namespace bitring
