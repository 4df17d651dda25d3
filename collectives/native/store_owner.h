// The owner of a store's shard, without Python: what training/store/owner.py does where updates are applied by an optimizer
// that has a kernel, and travel as they are or encoded by kernels. It gives the same bits.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "mailbox.h"
#include "store_editions.h"
#include "store_packing.h"
#include "store_rule.h"
#include "update_kernels.h"

namespace bitring {

// What a store's messages say, by the numbers of training/store/owner.py.
enum class StoreKind : std::uint8_t {
    push = 0, clock, leave, rest, end, read, use, slots, claim, go_on, ahead, forget, part = 13,
    values = 20, deferred, taken, dropped, settled, are, claimed,
    trouble = 30
};

class StoreOwner {
public:
    static constexpr std::int64_t kWindow = 4;  // updates that a member may have under way

    using Send = std::function<void(int member, StoreKind kind, int serial, std::vector<double> numbers, Payload payload)>;

    // Of parts whose values outlive it, in the order of their parameters. All members' updates are by `rule` and `settings`
    // at first. `edits`: answers are changes, as something of the store travels encoded, here or at other owners.
    StoreOwner(StoreRule state, int members, std::vector<StorePart> parts, Rule rule, const UpdateSettings& settings,
               bool edits);
    StoreOwner(const StoreOwner&) = delete;  // editions know where the parts are
    StoreOwner& operator=(const StoreOwner&) = delete;

    // From now on these are a member's.
    void use(int member, Rule rule, const UpdateSettings& settings);

    // Acts on a member's message: any but `use` and `slots`. `memory`: for payloads. Throws std::invalid_argument for one
    // that does not fit the shard.
    void hear(MailMessage& message, const Send& send, const StoreMemory& memory);

    // The shard's values are others than updates made of them; not while it hears.
    void restart();

    // What can be told of it, in any thread.
    struct Seen {
        std::vector<double> clocks;
        std::int64_t applied, dropped;
        std::size_t waiting;                             // reads
        std::vector<std::pair<std::int64_t, std::int64_t>> staleness;  // of updates -> how many
    };
    Seen seen() const;

private:
    struct Optimizer {
        Rule rule;
        UpdateSettings settings;
    };

    // Words in memory, which suit any type.
    using Room = std::vector<std::int64_t>;

    char* gradient(const StorePiece& piece, double scale, Room& room) const;
    void apply(const Payload& payload, double scale, const Optimizer& optimizer);
    void apply_sum(const std::vector<StoreAction::Update>& updates, const Optimizer& optimizer);
    void apply(const StoreAction& action);
    Payload read(const Payload& wanted, const StoreMemory& memory) const;
    std::vector<double> head(int member, bool changes);
    Optimizer checked(Rule rule, const UpdateSettings& settings) const;
    StoreRule::Actions event(const MailMessage& message);

    const std::vector<StorePart> parts_;
    std::optional<StoreEditions> editions_;
    Room decoded_;                       // a piece of an update
    std::vector<Optimizer> optimizers_;  // of members
    std::map<std::pair<int, int>, std::vector<Payload>> updates_;
    std::vector<std::pair<Payload, std::int64_t>> wanted_;  // of each member's read; nothing: all; and its edition
    std::vector<int> rests_;       // the ticket of each one's request to settle
    std::vector<double> troubles_;
    std::vector<std::int64_t> taken_, told_;

    mutable std::mutex mutex_;  // over what seen() tells
    StoreRule state_;
    std::int64_t applied_ = 0, dropped_ = 0;
    std::map<std::int64_t, std::int64_t> staleness_;
};

}  // namespace bitring
