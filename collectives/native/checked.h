// An operation that is run once all ranks of the node have been found to mean the same.
#pragma once

#include <memory>
#include <utility>

#include "node.h"
#include "operation.h"

namespace bitring {

class Checked final : public Operation {
public:
    // `next` may use the MPI library. Where ranks differ it does not begin, and this is over with `disagree`.
    Checked(std::shared_ptr<Node> node, const Intent& intent, std::shared_ptr<Operation> next)
        : node_(std::move(node)), intent_(intent), next_(std::move(next)) {}

    int awaited() const override { return agreed_ ? next_->awaited() : node_->name(node_->awaited()); }
    int error() const override { return agreed_ ? next_->error() : 0; }
    const char* reason() const override { return agreed_ ? next_->reason() : nullptr; }
    bool calls_library() const override { return true; }
    const Verdict& verdict() const { return verdict_; }

protected:
    void start() override {
        agreed_ = false;
        node_->arrive(intent_, nullptr, 0);
    }
    Status step() override {
        if (agreed_) return next_->advance();
        if (!node_->all_arrived()) return Status::waiting;
        verdict_ = node_->verdict();
        if (!verdict_.same || verdict_.flags != intent_.flags) return Status::disagree;
        agreed_ = true;
        next_->begin();
        return next_->advance();
    }

private:
    std::shared_ptr<Node> node_;
    Intent intent_;
    std::shared_ptr<Operation> next_;
    Verdict verdict_;
    bool agreed_ = false;
};

}  // namespace bitring
