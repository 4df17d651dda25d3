// Values that travel with ranks' arrival at a collective.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace bitring {

enum class Collective : std::uint8_t { allreduce, reduce, broadcast, allgather, reduce_scatter };

// `n` values: of an allgather and a reduce_scatter a block of as many values of each rank. `from` is what this rank gives:
// all of them, its own block of an allgather, nothing of a broadcast where it is not the root. `to` is what it gets: all of
// them, its own block of a reduce_scatter, nothing of a reduce where it is not the root. They may be the same memory.
struct Carried {
    Collective collective = Collective::allreduce;
    const void* from = nullptr;
    void* to = nullptr;
    std::size_t n = 0;
    std::size_t itemsize = 1;
    Reduce reduce = nullptr;
    int root = 0;
    std::size_t stride = 0;  // values from one block to the next in the caller's array

    std::size_t nbytes() const { return n * itemsize; }
    bool has_blocks() const { return collective == Collective::allgather || collective == Collective::reduce_scatter; }
    bool reduces() const { return collective != Collective::allgather && collective != Collective::broadcast; }
    std::size_t block_nbytes(std::size_t ranks) const { return n / ranks * itemsize; }

    // Bytes of what one of `ranks` ranks gives, where it gives anything.
    std::size_t given_nbytes(std::size_t ranks) const {
        return collective == Collective::allgather ? block_nbytes(ranks) : nbytes();
    }
    bool gives(int rank) const { return n > 0 && (collective != Collective::broadcast || rank == root); }
};

// What this rank gives, to `to`; the blocks of a reduce_scatter go to their `places`, of which there is one for each rank.
void give(const Carried& carried, const std::vector<int>& places, char* to);

// What `rank` gets, from all `values`; blocks are at their `places`.
void take(const Carried& carried, int rank, const std::vector<int>& places, const char* values);

}  // namespace bitring
