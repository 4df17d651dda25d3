#include "leaders_allreduce.h"

#include <algorithm>
#include <utility>

namespace bitring {

LeadersAllreduce::LeadersAllreduce(std::shared_ptr<NodesRollCall> roll_call, const Intent& intent,
                                   const Operand& operand, std::size_t own_first, std::size_t own_last)
    : roll_call_(std::move(roll_call)),
      intent_(intent),
      operand_(operand),
      own_first_(own_first),
      own_last_(own_last) {}

void LeadersAllreduce::rebind(const Intent& intent, const Operand& operand, const Region*) {
    intent_ = intent;
    operand_ = operand;
    own_first_ = 0;
    own_last_ = operand.n;
}

void LeadersAllreduce::arrive() {
    next_ = std::min(operand_.n, at_ + roll_call_->most() / operand_.itemsize);
    const std::size_t offset = at_ * operand_.itemsize;
    const auto within = [&](std::size_t value) { return std::clamp(value, at_, next_) - at_; };
    const Carried carried{static_cast<const char*>(operand_.from) + offset, static_cast<char*>(operand_.to) + offset,
                          next_ - at_,   operand_.itemsize, operand_.reduce,
                          within(own_first_), within(own_last_)};
    roll_call_->arrive(intent_, &carried);
}

Status LeadersAllreduce::step() {
    const Status status = roll_call_->step();
    if (status != Status::done) return status;
    const Verdict& verdict = roll_call_->verdict();
    if (!verdict.same || verdict.flags != 0) return Status::disagree;
    at_ = next_;
    if (at_ == operand_.n) return Status::done;
    arrive();
    return Status::moved;
}

}  // namespace bitring
