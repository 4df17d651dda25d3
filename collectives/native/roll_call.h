// How all ranks of a communicator find out, when they come to an operation, whether they mean the same.
#pragma once

#include <memory>
#include <utility>

#include "node.h"
#include "operation.h"

namespace bitring {

class RollCall {
public:
    virtual ~RollCall() = default;

    // Come to the next operation; none may be under way. Calls no library.
    virtual void arrive(const Intent& intent) = 0;

    // Find out what the others have said: `done` when verdict() is there, `failed` when error() says why not.
    virtual Status step() = 0;
    virtual const Verdict& verdict() const = 0;

    // As an Operation's.
    virtual int awaited() const = 0;
    virtual int error() const { return 0; }
    virtual bool calls_library() const { return false; }

    // Whether the ranks make a call of this signature, next, without waiting for all: it must not begin with any other
    // message. Whether there are such calls.
    virtual bool repeats(std::uint64_t) const { return false; }
    virtual bool repeating() const { return false; }
};

// Among the ranks of one node.
class NodeRollCall final : public RollCall {
public:
    explicit NodeRollCall(std::shared_ptr<Node> node) : node_(std::move(node)) {}

    void arrive(const Intent& intent) override { node_->arrive(intent, nullptr, 0); }
    Status step() override {
        if (!node_->all_arrived()) return Status::waiting;
        verdict_ = node_->verdict();
        return Status::done;
    }
    const Verdict& verdict() const override { return verdict_; }
    int awaited() const override { return node_->name(node_->awaited()); }

private:
    std::shared_ptr<Node> node_;
    Verdict verdict_;
};

// An operation that only finds out whether all ranks mean the same.
class Agreement final : public Operation {
public:
    Agreement(std::shared_ptr<RollCall> roll_call, const Intent& intent)
        : roll_call_(std::move(roll_call)), intent_(intent) {}

    int awaited() const override { return roll_call_->awaited(); }
    int error() const override { return roll_call_->error(); }
    bool calls_library() const override { return roll_call_->calls_library(); }
    const Verdict& verdict() const { return roll_call_->verdict(); }

protected:
    void start() override { roll_call_->arrive(intent_); }
    Status step() override { return roll_call_->step(); }

private:
    std::shared_ptr<RollCall> roll_call_;
    Intent intent_;
};

}  // namespace bitring
