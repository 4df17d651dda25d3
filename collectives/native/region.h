// Memory of which every rank of a node has a part, and every rank maps all the parts.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "memory.h"

namespace bitring {

class Region {
public:
    // `parts[r]` is rank r's, mapped here. `number` tells a node's regions apart.
    Region(int rank, std::uint64_t number, std::vector<Memory> parts)
        : rank_(rank), number_(number), parts_(std::move(parts)) {}

    Region(const Region&) = delete;
    Region& operator=(const Region&) = delete;

    int rank() const { return rank_; }
    std::uint64_t number() const { return number_; }
    int size() const { return int(parts_.size()); }
    char* part(int r) const { return parts_[std::size_t(r)].data(); }
    std::size_t nbytes() const { return parts_[std::size_t(rank_)].nbytes(); }

    // This rank's part shows rank r's, at the same addresses; and its own again, which takes over the values. See Memory.
    void unite(int r) {
        if (r != rank_) parts_[std::size_t(rank_)].show(parts_[std::size_t(r)]);
    }
    void part_again() { parts_[std::size_t(rank_)].show_own(); }

    bool holds(const void* data, std::size_t nbytes) const {
        const auto begin = reinterpret_cast<std::uintptr_t>(part(rank_));
        const auto first = reinterpret_cast<std::uintptr_t>(data);
        return first >= begin && first + nbytes <= begin + this->nbytes();
    }

    // Where `data`, which it holds, is: the same number on all ranks that mean the same place. Never 0.
    std::uint64_t where(const void* data) const {
        const auto offset = static_cast<const char*>(data) - part(rank_);
        return (number_ + 1) << 40 | std::uint64_t(offset);
    }

private:
    int rank_;
    std::uint64_t number_;
    std::vector<Memory> parts_;
};

}  // namespace bitring
