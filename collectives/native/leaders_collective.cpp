#include "leaders_collective.h"

#include <algorithm>

namespace bitring {

void LeadersCollective::arrive() {
    const std::size_t room = std::max<std::size_t>(1, roll_call_->most() / (carried_.itemsize * parts()));
    next_ = std::min(carried_.n / parts(), at_ + room);
    const std::size_t offset = at_ * carried_.itemsize;
    Carried piece = carried_;
    piece.n = (next_ - at_) * parts();
    if (piece.from != nullptr) piece.from = static_cast<const char*>(piece.from) + offset;
    if (piece.to != nullptr) piece.to = static_cast<char*>(piece.to) + offset;
    roll_call_->arrive(intent_, &piece);
}

Status LeadersCollective::step() {
    const Status status = roll_call_->step();
    if (status != Status::done) return status;
    const Verdict& verdict = roll_call_->verdict();
    if (!verdict.same || verdict.flags != 0) return Status::disagree;
    at_ = next_;
    if (at_ == carried_.n / parts()) return Status::done;
    arrive();
    return Status::moved;
}

}  // namespace bitring
