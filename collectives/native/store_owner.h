// The owner of a store's shard, without Python: what training/store/owner.py does where updates are applied by an optimizer
// that has a kernel, and travel as they are. It gives the same bits.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "mailbox.h"
#include "store_rule.h"
#include "update_kernels.h"

namespace bitring {

// What a store's messages say, by the numbers of training/store/owner.py.
enum class StoreKind : std::uint8_t {
    push = 0, clock, leave, rest, end, read, use, slots, claim, go_on, ahead, forget,
    values = 20, deferred, taken, dropped, settled, are, claimed,
    trouble = 30
};

// The owner's rows of a parameter.
struct StorePart {
    std::int64_t parameter;  // its number
    char* values;
    char* slot;  // the optimizer's for them; null: it has none
    std::size_t rows, width;
    Type type;  // float32 or float64

    std::size_t itemsize() const { return type == Type::f64 ? 8 : 4; }
    std::size_t row_nbytes() const { return width * itemsize(); }
    std::size_t nbytes() const { return rows * row_nbytes(); }
};

class StoreOwner {
public:
    static constexpr std::int64_t kWindow = 4;  // updates that a member may have under way

    using Send = std::function<void(int member, StoreKind kind, int serial, std::vector<double> numbers, Payload payload)>;

    // Of parts that outlive it, in the order of their parameters. All members' updates are by `rule` and `settings` at first.
    StoreOwner(StoreRule state, int members, std::vector<StorePart> parts, Rule rule, const UpdateSettings& settings);

    // From now on these are a member's.
    void use(int member, Rule rule, const UpdateSettings& settings);

    // Acts on a member's message: any but `use` and `slots`. `memory`: for payloads. Throws std::invalid_argument for one
    // that does not fit the shard.
    void hear(MailMessage& message, const Send& send, const std::function<Payload(std::size_t)>& memory);

    // What can be told of it, in any thread.
    struct Seen {
        std::vector<double> clocks;
        std::int64_t applied, dropped;
        std::size_t waiting;                             // reads
        std::vector<std::pair<std::int64_t, std::int64_t>> staleness;  // of updates -> how many
    };
    Seen seen() const;

private:
    struct Piece {
        const StorePart* part;
        const std::int64_t* rows;  // null: all
        std::size_t n;             // rows
        char* data;
        std::size_t nbytes;
    };
    struct Optimizer {
        Rule rule;
        UpdateSettings settings;
    };

    std::vector<Piece> unpack(const Payload& payload) const;
    void scale(const Piece& piece, double scale) const;
    void apply(const std::vector<Payload>& update, double scale, const Optimizer& optimizer);
    void apply_sum(const std::vector<StoreAction::Update>& updates, const Optimizer& optimizer);
    void apply(const StoreAction& action);
    Payload pack(const std::vector<Piece>& pieces, const std::function<Payload(std::size_t)>& memory) const;
    Payload read(const Payload& wanted, const std::function<Payload(std::size_t)>& memory) const;
    std::vector<double> head(int member);
    Optimizer checked(Rule rule, const UpdateSettings& settings) const;
    StoreRule::Actions event(const MailMessage& message);

    std::vector<StorePart> parts_;
    std::map<std::int64_t, std::size_t> places_;  // of parameters among the parts
    std::vector<Optimizer> optimizers_;           // of members
    std::map<std::pair<int, int>, std::vector<Payload>> updates_;
    std::vector<Payload> wanted_;  // of each member's read; nothing: all
    std::vector<int> rests_;       // the ticket of each one's request to settle
    std::vector<double> troubles_;
    std::vector<std::int64_t> taken_, told_;

    mutable std::mutex mutex_;  // over what seen() tells
    StoreRule state_;
    std::int64_t applied_ = 0, dropped_ = 0;
    std::map<std::int64_t, std::int64_t> staleness_;
};

}  // namespace bitring
