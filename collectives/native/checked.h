// An operation that is run once all ranks have been found to mean the same.
#pragma once

#include <memory>
#include <utility>

#include "operation.h"
#include "roll_call.h"

namespace bitring {

class Checked final : public Operation {
public:
    // `next` may use the MPI library. Where ranks differ it does not begin, and this is over with `disagree`.
    Checked(std::shared_ptr<RollCall> roll_call, const Intent& intent, std::shared_ptr<Operation> next)
        : roll_call_(std::move(roll_call)), intent_(intent), next_(std::move(next)) {}

    int awaited() const override { return agreed_ ? next_->awaited() : roll_call_->awaited(); }
    int error() const override { return agreed_ ? next_->error() : roll_call_->error(); }
    const char* reason() const override { return agreed_ ? next_->reason() : nullptr; }
    bool calls_library() const override { return true; }
    const Verdict& verdict() const { return verdict_; }

    // What ranks say of the next runs.
    void sign(std::uint64_t signature) { intent_.signature = signature; }

protected:
    void start() override {
        agreed_ = false;
        roll_call_->arrive(intent_);
    }
    Status step() override {
        if (agreed_) return next_->advance();
        const Status status = roll_call_->step();
        if (status != Status::done) return status;
        verdict_ = roll_call_->verdict();
        if (!verdict_.same || verdict_.flags != intent_.flags) return Status::disagree;
        agreed_ = true;
        next_->begin();
        return next_->advance();
    }

private:
    std::shared_ptr<RollCall> roll_call_;
    Intent intent_;
    std::shared_ptr<Operation> next_;
    Verdict verdict_;
    bool agreed_ = false;
};

}  // namespace bitring
