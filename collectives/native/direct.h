// AllReduce of plain NumPy arrays among the ranks of a node, with nothing of Python between the call and the exchange.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "shared_allreduce.h"

namespace bitring {

// What became of a call.
enum class Outcome : int {
    done = 0,
    declined = 1,   // not for this way; nothing was done
    disagree = 2,   // the ranks' arrival said that they do not mean the same; operation() has the verdict
    unfinished = 3  // still waiting for a rank; operation() is under way
};

class Direct {
public:
    Direct(std::shared_ptr<Node> node, nanobind::object ndarray, nanobind::object in_place);

    // `op`, the very object, means `operation`; ranks that reduce `type` under it say `signature` (and the count).
    void serve(nanobind::object op, Op operation, Type type, std::uint64_t signature);

    // Arrays of at most `nbytes` are declined below `from` and served up to `to`.
    void limit(std::size_t from, std::size_t to) {
        from_ = from;
        to_ = to;
    }

    // Until remove(), which must come before its end, arrays in `region` are reduced there.
    void add(const Region* region) { regions_.push_back(region); }
    void remove(std::uint64_t number);

    Outcome allreduce(nanobind::handle sendbuf, nanobind::handle recvbuf, nanobind::handle op);

    std::shared_ptr<SharedAllreduce> operation() const { return operation_; }

    // Others use the node, or it was closed: calls are declined.
    int busy = 0;

    // Give the node's memory back; `busy` stays set from now on.
    void close() {
        operation_.reset();
        node_.reset();
    }

private:
    struct Served {
        nanobind::object op;
        std::array<std::uint64_t, type_count> signatures{};
        std::array<Reduce, type_count> kernels{};
    };

    std::shared_ptr<Node> node_;
    nanobind::object ndarray_;
    nanobind::object in_place_;
    std::vector<Served> served_;
    std::vector<const Region*> regions_;
    std::shared_ptr<SharedAllreduce> operation_;
    std::size_t from_ = 0, to_ = 0;
    bool running_ = false;
};

// The signature of `count` values of what `signature` names.
inline std::uint64_t with_count(std::uint64_t signature, std::uint64_t count) {
    std::uint64_t h = (signature ^ count) * 0x9e3779b97f4a7c15u;
    h ^= h >> 29;
    return (signature & 0xffffffff00000000u) | (h & 0xffffffffu);
}

// Run the operation in this thread for up to `seconds`; Python's lock is given up when it takes longer than microseconds.
Status run_for(Operation& operation, double seconds);

}  // namespace bitring
