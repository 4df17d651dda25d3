// Values in memory that the ranks of a node share, which each of them updates and reads itself: there is no server.
//
// A lock covers a block of the values. A pass, an update or a read, goes from block to block; where one is held it does
// the others first, and ranks begin at different places, so that they seldom meet. A pass without locks is racy: where two
// ranks update a value at the same moment one of the updates may be lost (Recht et al., HOGWILD!, 2011).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "shared_lock.h"
#include "update_kernels.h"

namespace bitring {

class Shard {
public:
    static constexpr std::size_t kBlock = 64 << 10;  // bytes of values that a lock covers

    // Bytes that the locks of so many bytes of values take; zeroed before anybody uses them.
    static std::size_t locks_nbytes(std::size_t nbytes) { return (nbytes + kBlock - 1) / kBlock * sizeof(Lock); }

    // n values of `itemsize` bytes, the optimizer's slot for them (null: it has none), and their locks, in memory that
    // `size` ranks share and that outlives this. This is rank `rank` of them.
    Shard(int rank, int size, char* values, char* slot, std::size_t n, std::size_t itemsize, char* locks)
        : rank_(rank),
          size_(size),
          values_(values),
          slot_(slot),
          n_(n),
          itemsize_(itemsize),
          locks_(reinterpret_cast<Lock*>(locks)),
          dead_(std::size_t(size)) {}

    std::size_t n() const { return n_; }

    // Locks of this rank, which has died, are taken over: their blocks have a part of its last update, as its other blocks.
    void bury(int rank) { dead_[std::size_t(rank)] = true; }

private:
    friend class ShardPass;
    struct alignas(64) Lock {
        SharedLock lock;
    };

    std::size_t block_values() const { return kBlock / itemsize_; }

    int rank_, size_;
    char* values_;
    char* slot_;
    std::size_t n_, itemsize_;
    Lock* locks_;
    Dead dead_;
};

// One update or read of runs of a shard's values: of each of `starts`, which ascend, and the `width` values from there on.
class ShardPass {
public:
    // Updates the shard by `update` from `values`, those of all runs one after the other.
    ShardPass(std::shared_ptr<Shard> shard, std::vector<std::int64_t> starts, std::size_t width, const void* values,
              bool locked, Update update, const UpdateSettings& settings);

    // Copies the shard's values into `values`.
    ShardPass(std::shared_ptr<Shard> shard, std::vector<std::int64_t> starts, std::size_t width, void* values, bool locked);

    // Goes on for about so long. Returns -1 when it is over; else the rank that holds the block it waits for, or this
    // rank's own number when there is more to do.
    int run(double seconds);

private:
    // A place among the runs.
    struct Place {
        std::size_t run, offset;
        bool operator==(const Place& other) const { return run == other.run && offset == other.offset; }
    };

    Place place_of(std::size_t value) const;
    std::size_t block_at(Place place) const { return (std::size_t(starts_[place.run]) + place.offset) / block_values_; }
    // What lies in one block: from `first` to the result. `does`: do it, else step over it.
    Place pass(Place first, Place stop, bool does);
    void touch(std::size_t first, std::size_t n, char* values);
    bool at_end(Place place) const { return place.run == starts_.size(); }

    std::shared_ptr<Shard> shard_;
    std::vector<std::int64_t> starts_;
    std::size_t width_;
    char* values_;
    bool locked_;
    Update update_;  // null: a read
    UpdateSettings settings_;
    std::size_t block_values_;
    Place begin_, at_;
    bool wrapped_ = false, first_lap_over_ = false;
    std::vector<Place> held_;  // places in blocks that were held by others
};

}  // namespace bitring
