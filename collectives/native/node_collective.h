// Collectives of small values among the ranks of a node: each leaves what it gives in its slot, and reads what it gets.
#pragma once

#include <memory>
#include <vector>

#include "direct_collective.h"

namespace bitring {

class NodeCollective final : public DirectCollective {
public:
    explicit NodeCollective(std::shared_ptr<Node> node);

    // Of values of which a rank gives at most Node::kSmall bytes. Ranks are numbered as in the node.
    void rebind(const Intent& intent, const Carried& carried, const Region*) override {
        intent_ = intent;
        carried_ = carried;
    }

    int awaited() const override { return node_->name(node_->awaited()); }
    const Verdict& verdict() const override { return verdict_; }

protected:
    void start() override;
    Status step() override;

private:
    const char* given(int r) const {
        return static_cast<const char*>(node_->contribution(r, carried_.given_nbytes(places_.size())));
    }
    void reduce_from(std::size_t offset, std::size_t n);

    std::shared_ptr<Node> node_;
    Intent intent_;
    Carried carried_;
    Verdict verdict_;
    std::vector<int> places_;
    std::vector<const void*> inputs_;
};

}  // namespace bitring
