// How the ranks of several nodes find out whether they mean the same, and exchange small buffers on the way.
//
// The first ranks of all nodes, the leaders, exchange messages by recursive doubling; the other ranks of a node tell
// their leader what they are about to do through the node's memory, and hear from it what all said. Every message
// between two leaders begins with the same header, whatever the operation; small values travel behind it. So ranks
// that mean different things understand each other, and nobody's message is longer than what it is received in.
//
// Each of ⌈lg N⌉ rounds exchanges what two leaders have: the sums so far, or, of what is only moved, the values so far.
// Of sums that go to all, kHalving bytes and more between four nodes or more go by recursive halving and doubling
// (Rabenseifner), in twice as many rounds: the check is over when the first half is. A reduce_scatter is that first half.
// All ways add the same operands in the same order, those of lower ranks first. Of N nodes, the N−q beyond the largest
// power of two hand their values to a neighbour first and get the result back last.
//
// A small broadcast or reduction that all ranks have made before, from or to the same root, goes one way: along a
// binomial tree of the same pairs, so that who gets nothing waits for nobody. Each message still begins with the header.
// On a node who gives leaves its values in its slot and goes on; of a broadcast that comes from another node the leader
// leaves them in its own.
// Whoever finds another one than its own there has met a stranger, and says so in its verdict; ranks that have gone on
// hear of it otherwise. Every header has a hash of the calls made one way since all ranks met, so that the next meeting,
// after kAhead such calls at the latest, finds what nobody has come across.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "carried.h"
#include "node.h"
#include "roll_call.h"
#include "wire.h"

namespace bitring {

class NodesRollCall final : public RollCall {
public:
    static constexpr std::size_t kMost = 256 << 10;    // bytes of values in a message
    static constexpr std::size_t kHalving = 16 << 10;
    static constexpr std::size_t kOneWay = 8 << 10;    // at most so many go one way
    static constexpr std::size_t kAhead = 128;         // calls that a rank makes one way before it waits for all

    // `node` has what this node's ranks share; null where every rank is taken for a node. `nodes`: the ranks of each node,
    // numbered as on `wire`, nodes by their first ranks; `rank` is this one's. All messages have `tag`.
    NodesRollCall(std::shared_ptr<Node> node, std::unique_ptr<Wire> wire, int rank,
                  const std::vector<std::vector<int>>& nodes, int tag);

    void arrive(const Intent& intent) override { arrive(intent, nullptr); }

    // As arrive(); `carried`, of at most most() bytes, which must stay there, is exchanged where all ranks mean the same
    // and no rank has a flag set. Else nothing is written to it.
    void arrive(const Intent& intent, const Carried* carried);

    Status step() override;
    const Verdict& verdict() const override { return verdict_; }
    int awaited() const override { return awaited_; }
    int error() const override { return error_; }
    bool calls_library() const override { return true; }

    std::size_t ranks() const { return gathered_.size(); }

    // Bytes of values that one roll call can carry.
    std::size_t most() const { return node_ ? Node::kSmall : kMost; }

    // Messages under way at once.
    static constexpr int kRoom = 32;

    bool repeats(std::uint64_t signature) const override;
    bool repeating() const override;

    // Where this rank is, for others that wait: how often all have met, and the signatures of the calls since then, the
    // one under way among them; and whether that waits for all, so that they find out in it whether they mean the same.
    struct Place {
        std::uint64_t meetings = 0;
        std::vector<std::uint64_t> calls;
        bool meets = false;
    };
    Place place() const;

private:
    struct Header {
        std::uint64_t signature;
        std::uint64_t nbytes;  // of all values; 0 where none travel
        std::uint64_t strange;  // see Verdict
        std::uint32_t flags;
        std::uint32_t first, last;  // the values that are in this message
        std::uint32_t history;      // a hash of the calls made one way since all ranks met
        std::int32_t stranger;      // see Verdict
        std::uint8_t same, same_function;
        std::uint8_t one_way;
    };
    static constexpr std::size_t kHead = 64;
    static constexpr std::size_t kRepeated = 16;
    static constexpr int kSent = 0, kReceived = 1;
    static_assert(sizeof(Header) <= kHead, "values begin at a cache line");

    // The last three are of calls that go one way: values are sent on, added, or taken as the result.
    enum class Turn : std::uint8_t { give, take, exchange, spread, hand_back, get_back, tell, add, hear };
    struct Round {
        Turn turn;
        int peer;      // a rank
        bool upper = false;  // of `exchange` and `spread`: this rank keeps the upper half of what the two have
        // Places of blocks in a reduce_scatter: where that half begins; of `hand_back` the first of the peer's and the one
        // after its last.
        int first = 0, last = 0;
    };
    enum class Phase : std::uint8_t { gathering, leading, following, leaving };

    // What the leader leaves in its slot in place of the values of a broadcast, where it has met a stranger.
    struct Strange {
        int rank;
        std::uint64_t signature;
    };

    bool leads() const { return !node_ || node_->rank() == 0; }
    // Of a broadcast that goes one way: whether its values come to this node's ranks by the leader's slot.
    bool tells_late() const { return source_ == 0 && carried_.root != leader_; }
    bool clean() const { return mine().same != 0 && mine().flags == 0; }
    bool scatters() const { return carried_.collective == Collective::reduce_scatter; }
    bool halves() const {
        return scatters() || (carried_.reduces() && halving_rounds_ > 1 && mine().nbytes >= kHalving);
    }
    const std::vector<int>& places() const { return scatters() ? scattered_ : gathered_; }
    const std::vector<Round>& rounds() const { return one_way_ ? one_way_rounds_ : rounds_; }
    static bool may_go_one_way(const Carried& carried) {
        const bool rooted = carried.collective == Collective::broadcast || carried.collective == Collective::reduce;
        return rooted && carried.n > 0 && carried.nbytes() <= kOneWay;
    }
    Header& mine() const { return *reinterpret_cast<Header*>(whole_); }
    char* values() const { return whole_ + kHead; }
    char* block(int place) const { return values() + std::size_t(place) * carried_.block_nbytes(ranks()); }
    void gather();
    void gather_values();
    void begin_round();
    void end_round();
    void merge(int peer);
    bool is_strange() const;
    bool knows(std::uint64_t signature) const;
    void conclude();
    void note();
    void conclude_alone(int stranger);
    bool has_followed();
    void tell_node();
    Status leave();
    void make_one_way_rounds();
    void send_values(std::size_t first, std::size_t last, int peer);
    void send(const void* memory, std::size_t nbytes, int peer);
    void receive(void* memory, std::size_t nbytes, int peer);

    std::shared_ptr<Node> node_;
    std::unique_ptr<Wire> wire_;
    int rank_;
    int leader_;  // this node's
    int tag_;
    std::vector<int> members_;              // this node's ranks
    std::vector<int> gathered_, scattered_;  // the place of each rank's block in an allgather, and in a reduce_scatter
    std::vector<Round> rounds_;
    int halving_rounds_ = 0;  // rounds of `exchange`
    std::vector<int> leaders_;   // of each node
    std::vector<int> node_of_;   // each rank's
    int own_node_ = 0, doubling_ = 1, extra_ = 0;
    std::unique_ptr<char[]> memory_;
    char* whole_ = nullptr;   // this node's header, and the values as far as they are reduced: one of the next two
    char* shared_ = nullptr;  // where the other ranks of the node see it
    char* own_ = nullptr;     // where nobody does
    char* out_ = nullptr;     // a message that is sent
    char* in_ = nullptr;      // one that is received

    Intent intent_;
    Carried carried_{};
    Verdict verdict_;
    Phase phase_ = Phase::gathering;
    std::size_t round_ = 0;
    std::size_t first_ = 0, last_ = 0;  // the values that this rank has; of those that it halves, those it keeps
    std::vector<std::pair<std::size_t, std::size_t>> kept_;  // what these were before each halving
    int under_way_ = 0;
    int awaited_ = -1;
    int error_ = 0;
    std::vector<const void*> inputs_;

    // What all ranks have done when they met, and may make one way: calls of one collective, from or to one root. So no
    // two ranks can wait for each other's values.
    Collective repeated_ = Collective::broadcast;
    int repeated_root_ = -1;
    std::vector<std::uint64_t> repeated_signatures_;
    std::vector<Round> one_way_rounds_;
    bool one_way_ = false;       // the call under way
    int source_ = -1;            // in a broadcast that goes one way: whose slot has the values, of this node's ranks
    std::uint32_t history_ = 0;  // of place_.calls
    mutable std::mutex place_mutex_;  // of what a thread may ask for while another is in a call
    Place place_;                // without the call under way
    bool inside_ = false;        // in a call
};

}  // namespace bitring
