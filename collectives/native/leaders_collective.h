// Collectives of small values across nodes, in the messages by which ranks find out whether they mean the same: what a
// node's ranks give through its memory, recursive doubling between the nodes' first ranks, the result through memory again.
#pragma once

#include <memory>

#include "direct_collective.h"
#include "nodes_roll_call.h"

namespace bitring {

class LeadersCollective final : public DirectCollective {
public:
    // Values beyond roll_call->most() bytes go in several pieces, one after the other; of blocks a part of each.
    LeadersCollective(std::shared_ptr<NodesRollCall> roll_call, const Intent& intent, const Carried& carried)
        : roll_call_(std::move(roll_call)), intent_(intent), carried_(carried) {}

    void rebind(const Intent& intent, const Carried& carried, const Region*) override {
        intent_ = intent;
        carried_ = carried;
    }

    // What ranks say of the next runs.
    void sign(std::uint64_t signature) { intent_.signature = signature; }

    int awaited() const override { return roll_call_->awaited(); }
    int error() const override { return roll_call_->error(); }
    bool calls_library() const override { return true; }
    const Verdict& verdict() const override { return roll_call_->verdict(); }

protected:
    void start() override {
        at_ = 0;
        arrive();
    }
    Status step() override;

private:
    // Into so many equal parts the values are divided, of which a piece has some of each.
    std::size_t parts() const { return carried_.has_blocks() ? roll_call_->ranks() : 1; }
    void arrive();

    std::shared_ptr<NodesRollCall> roll_call_;
    Intent intent_;
    Carried carried_;
    std::size_t at_ = 0;    // the first value, of each part, in the piece under way
    std::size_t next_ = 0;  // the first one after it
};

}  // namespace bitring
