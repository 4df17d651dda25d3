// How the ranks of several nodes find out whether they mean the same, and reduce small buffers on the way.
//
// The first ranks of all nodes, the leaders, exchange messages by recursive doubling; the other ranks of a node tell
// their leader what they are about to do through the node's memory, and hear from it what all said. Every message
// between two leaders begins with the same header, whatever the operation; small values travel behind it. So ranks
// that mean different things understand each other, and nobody's message is longer than what it is received in.
//
// Values of up to kHalving bytes, and any between two or three nodes, are exchanged whole in each of ⌈lg N⌉ rounds; more
// of them by recursive halving and doubling (Rabenseifner), in twice as many: the check is over when the first half is.
// Both ways add the same operands in the same order, those of lower ranks first. Of N nodes, the N−q beyond the largest
// power of two hand their values to a neighbour first and get the result back last.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "node.h"
#include "roll_call.h"
#include "wire.h"

namespace bitring {

// Values that travel with a roll call: `n` of them, reduced from `from` into `to`, which may be the same memory. This rank
// contributes those from own_first to own_last; zeros stand for its others.
struct Carried {
    const void* from;
    void* to;
    std::size_t n;
    std::size_t itemsize;
    Reduce reduce;
    std::size_t own_first;
    std::size_t own_last;

    std::size_t nbytes() const { return n * itemsize; }
};

class NodesRollCall final : public RollCall {
public:
    static constexpr std::size_t kMost = 128 << 10;    // bytes of values in a message
    static constexpr std::size_t kHalving = 8 << 10;

    // `node` has what this node's ranks share; null where every rank is a leader. `leaders` are ranks on `wire`, in rising
    // order; `rank` is this one's. All messages have `tag`.
    NodesRollCall(std::shared_ptr<Node> node, std::unique_ptr<Wire> wire, int rank, std::vector<int> leaders, int tag);

    void arrive(const Intent& intent) override { arrive(intent, nullptr); }

    // As arrive(); `carried`, of at most most() bytes, which must stay there, is reduced where all ranks mean the same and
    // no rank has a flag set. Else nothing is written to it.
    void arrive(const Intent& intent, const Carried* carried);

    Status step() override;
    const Verdict& verdict() const override { return verdict_; }
    int awaited() const override { return awaited_; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }

    // Bytes of values that one roll call can carry.
    std::size_t most() const { return node_ ? Node::kSmall : kMost; }

    // Messages under way at once.
    static constexpr int kRoom = 2;

private:
    struct Header {
        std::uint64_t signature;
        std::uint64_t nbytes;  // of the values; 0 where none travel
        std::uint32_t flags;
        std::uint8_t same, same_function;
    };
    static constexpr std::size_t kHead = 64;
    static_assert(sizeof(Header) <= kHead, "values begin at a cache line");

    enum class Turn : std::uint8_t { give, take, exchange, spread, hand_back, get_back };
    struct Round {
        Turn turn;
        int peer;      // a rank
        bool upper;    // of `exchange` and `spread`: this rank keeps the upper half of what the two have
    };
    enum class Phase : std::uint8_t { gathering, leading, following };

    bool leads() const { return !node_ || node_->rank() == 0; }
    bool clean() const { return mine().same != 0 && mine().flags == 0; }
    bool halves() const { return halving_rounds_ > 1 && mine().nbytes > kHalving; }
    Header& mine() const { return *reinterpret_cast<Header*>(whole_); }
    char* values() const { return whole_ + kHead; }
    void gather();
    void fill(char* to) const;
    void begin_round();
    void end_round();
    void combine(std::size_t first, std::size_t last, int peer);
    void conclude();
    void send(const void* memory, std::size_t nbytes, int peer);
    void receive(void* memory, std::size_t nbytes, int peer);

    std::shared_ptr<Node> node_;
    std::unique_ptr<Wire> wire_;
    int rank_;
    int leader_;  // this node's
    int tag_;
    std::vector<Round> rounds_;
    int halving_rounds_ = 0;  // rounds of `exchange`
    std::unique_ptr<char[]> memory_;
    char* whole_ = nullptr;   // this node's header, and the values as far as they are reduced
    char* out_ = nullptr;     // a message that is sent
    char* in_ = nullptr;      // one that is received

    Intent intent_;
    Carried carried_{};
    Verdict verdict_;
    Phase phase_ = Phase::gathering;
    std::size_t round_ = 0;
    std::size_t first_ = 0, last_ = 0;                      // values that this rank is to reduce further
    std::vector<std::pair<std::size_t, std::size_t>> kept_;  // what these were before each round
    int under_way_ = 0;
    int awaited_ = -1;
    int error_ = 0;
    std::vector<const void*> inputs_;
};

}  // namespace bitring
