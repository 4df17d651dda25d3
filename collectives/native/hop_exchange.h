// The hops of one step of a split model (training/placement/messages.py is the reference): regions of arrays that move
// between ranks, and are put together or added up where they arrive. Which they are is given once. A step posts all
// receives at its begin, sends a hop's regions when the array is there, and waits when somebody wants a hop's result.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "codec.h"
#include "kernels.h"
#include "operation.h"
#include "wire.h"

namespace bitring {

// Where the values of a region lie in an array: `runs` of `run` values each, the first at value `first`, each `stride`
// values after the one before.
struct Runs {
    std::int64_t first, runs, run, stride;
    std::int64_t values() const { return runs * run; }
    bool contiguous() const { return runs <= 1 || run == stride; }
};

// A region that this rank sends to `peer`, gets from there, or, where that is itself, keeps.
struct HopMove {
    int peer, tag;
    std::int64_t nbytes;  // of the message
    Runs from;            // in the array before the hop: of what is sent or kept
    Runs to;              // in the result: of what arrives or is kept
};

struct Hop {
    std::vector<HopMove> sends;
    std::vector<HopMove> arrivals;  // in the order in which they are added up
    bool adds;                      // to zeros; else each value of the result is written once
    bool encoded;                   // messages are payloads of the codec
    void* result;                   // of `values`, the same in every step
    std::int64_t values;
};

class HopExchange final : public Operation {
public:
    // `codec` may be null where no hop is encoded. It encodes values of the type, with `wide_itemsize` bytes a residual.
    HopExchange(std::unique_ptr<Wire> wire, int rank, Type type, std::vector<Hop> hops, const Codec* codec,
                std::size_t wide_itemsize);

    // Send what others get in a hop, of the array at `from`, which may be overwritten afterwards. Once a step.
    void send(std::size_t hop, const void* from);

    // From now on this is over when the hop's result is there; what is kept is taken from the array at `from`.
    void expect(std::size_t hop, const void* from);

    // From now on this is over when all that was to be sent has been.
    void expect_sent();

    int awaited() const override { return awaited_; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }
    const char* reason() const override;

    // Messages under way at once, at most.
    static int room(const std::vector<Hop>& hops, int rank);

protected:
    void start() override;
    Status step() override;

private:
    static constexpr int kCorrupt = -1;  // a payload could not be encoded or decoded

    enum class Wanted : std::uint8_t { nothing, result, sent };

    // A message's memory: packed values, and their payload. Null what is not needed.
    struct Buffer {
        std::unique_ptr<char[]> values, payload;
        bool sends = false, there = false;
    };

    bool lands_in_result(const Hop& hop, const HopMove& move) const;
    void prepare(const Hop& hop, const HopMove& move, bool sends);
    bool take_next();
    Status over(Status status) {
        wanted_ = Wanted::nothing;
        return status;
    }

    std::unique_ptr<Wire> wire_;
    const int rank_;
    const std::size_t itemsize_, wide_itemsize_;
    const Reduce add_;
    const std::vector<Hop> hops_;
    const Codec codec_;
    std::vector<Buffer> buffers_;            // by the message's number
    std::vector<std::size_t> first_send_;    // by hop: the number of its first message out; the others follow
    std::vector<std::vector<int>> arrival_;  // by hop and arrival: its message's number; -1: it is kept
    std::vector<char> residual_;             // zeros, for the largest region that is encoded
    std::vector<int> landed_;
    Wanted wanted_ = Wanted::nothing;
    std::size_t hop_ = 0, next_ = 0;  // what is wanted, and which of its arrivals is to be taken next
    const char* from_ = nullptr;
    std::size_t unsent_ = 0;
    int awaited_ = -1;
    int error_ = 0;
};

}  // namespace bitring
