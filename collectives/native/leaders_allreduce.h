// AllReduce of small values across nodes, in the messages by which ranks find out whether they mean the same: the sum of a
// node through its memory, recursive doubling between the nodes' first ranks, the result through memory again.
#pragma once

#include <memory>

#include "direct_allreduce.h"
#include "nodes_roll_call.h"

namespace bitring {

class LeadersAllreduce final : public DirectAllreduce {
public:
    // Values beyond roll_call->most() bytes go in several pieces, one after the other. This rank contributes those from
    // own_first to own_last, and zeros for the others.
    LeadersAllreduce(std::shared_ptr<NodesRollCall> roll_call, const Intent& intent, const Operand& operand,
                     std::size_t own_first, std::size_t own_last);

    void rebind(const Intent& intent, const Operand& operand, const Region* region) override;

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
    void arrive();

    std::shared_ptr<NodesRollCall> roll_call_;
    Intent intent_;
    Operand operand_;
    std::size_t own_first_, own_last_;
    std::size_t at_ = 0;    // the first value of the piece under way
    std::size_t next_ = 0;  // the first one after it
};

}  // namespace bitring
