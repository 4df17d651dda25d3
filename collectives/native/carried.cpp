#include "carried.h"

#include "copy.h"

namespace bitring {

void give(const Carried& carried, const std::vector<int>& places, char* to) {
    const std::size_t ranks = places.size(), block = carried.block_nbytes(ranks);
    const char* from = static_cast<const char*>(carried.from);
    if (carried.collective != Collective::reduce_scatter) {
        copy_bytes(to, from, carried.given_nbytes(ranks));
        return;
    }
    for (std::size_t r = 0; r < ranks; ++r) {
        copy_bytes(to + std::size_t(places[r]) * block, from + r * carried.stride * carried.itemsize, block);
    }
}

void take(const Carried& carried, int rank, const std::vector<int>& places, const char* values) {
    const std::size_t ranks = places.size(), block = carried.block_nbytes(ranks);
    char* to = static_cast<char*>(carried.to);
    switch (carried.collective) {
    case Collective::reduce:
        if (rank != carried.root) return;
        break;
    case Collective::broadcast:
        if (rank == carried.root) return;
        break;
    case Collective::allgather:
        for (std::size_t r = 0; r < ranks; ++r) {
            copy_bytes(to + r * carried.stride * carried.itemsize, values + std::size_t(places[r]) * block, block);
        }
        return;
    case Collective::reduce_scatter:
        copy_bytes(to, values + std::size_t(places[std::size_t(rank)]) * block, block);
        return;
    default:
        break;
    }
    copy_bytes(to, values, carried.nbytes());
}

}  // namespace bitring
