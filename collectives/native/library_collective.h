// A collective of the MPI library's own, as an operation. It is not the blocking one, so that ranks that are gone are
// noticed.
#pragma once

#include <cstdint>
#include <memory>

#include "bound_collective.h"
#include "carried.h"
#include "mpi_wire.h"

namespace bitring {

class LibraryCollective : public BoundCollective {
public:
    // A broadcast has `to` alone.
    void bind(const void* from, void* to) override {
        from_ = from;
        to_ = to;
    }

    int awaited() const override { return -1; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }

protected:
    const void* from_ = nullptr;
    void* to_ = nullptr;
    int error_ = 0;
};

// Values of MPI handles, and of MPI_IN_PLACE. `count`: values of all, or of a block where there are blocks. The library
// is not called while there is unread news.
struct LibraryCall {
    Collective collective;
    std::uint64_t comm;
    std::uint64_t datatype;
    std::uint64_t op;
    std::int64_t in_place;
    int count;
    int root;
};

std::shared_ptr<LibraryCollective> make_library_collective(const MpiLibrary& library, int handle_size,
                                                           const LibraryCall& call);

// As above, of a persistent `request`, which is bound to its values and stays the caller's.
std::shared_ptr<LibraryCollective> make_persistent_collective(const MpiLibrary& library, int handle_size,
                                                              std::uint64_t request);

}  // namespace bitring
