// AllReduce across nodes, one lane a local rank: reduce-scatter inside the node through shared memory, then as many
// exchanges between the nodes as there are lanes, each of 1/lanes of the values, then allgather inside the node.
//
// Lane l is local rank l of every node; there are as many lanes as the smallest node has ranks. With N nodes each node
// sends 2(N−1)/N·n values, whatever its number of ranks.
#pragma once

#include <memory>

#include "bound_collective.h"
#include "kernels.h"
#include "node.h"
#include "region.h"

namespace bitring {

class LaneAllreduce final : public BoundCollective {
public:
    // n values from `buffer`, in place. `region`: the values themselves when `buffer` lies in it, else room for them.
    // `between`: the exchange of this rank's lane, to be bound to lane_values(); null on a rank that has no lane.
    LaneAllreduce(std::shared_ptr<Node> node, const Intent& intent, void* buffer, std::size_t n, std::size_t itemsize,
                  Reduce reduce, std::shared_ptr<const Region> region, int lanes, std::shared_ptr<Operation> between);

    // Only where `region` is room for the values.
    void bind(const void* from, void* to) override {
        given_ = static_cast<const char*>(from);
        buffer_ = static_cast<char*>(to);
    }

    int awaited() const override { return node_->name(awaited_); }
    int error() const override { return between_ ? between_->error() : 0; }
    const char* reason() const override { return between_ ? between_->reason() : nullptr; }
    bool calls_library() const override { return between_ != nullptr; }
    const Verdict& verdict() const { return verdict_; }

    // Where the exchange between nodes finds chunk `rank` of `lanes`, summed over the node.
    void* lane_values() const { return part(node_->rank()) + chunk_start(n_, lanes_, node_->rank()) * itemsize_; }

    // First value of lane l's chunk.
    static std::size_t chunk_start(std::size_t n, int lanes, int l) { return n * std::size_t(l) / std::size_t(lanes); }

protected:
    void start() override;
    Status step() override;

private:
    enum class Phase : std::uint8_t { arriving, reducing, between, gathering, leaving };

    char* part(int r) const { return region_->part(r) + offset_; }

    std::shared_ptr<Node> node_;
    Intent intent_;
    const char* given_;
    char* buffer_;
    std::size_t n_;
    std::size_t itemsize_;
    Reduce reduce_;
    std::shared_ptr<const Region> region_;
    bool resident_;
    std::size_t offset_;
    int lanes_;
    std::shared_ptr<Operation> between_;
    Verdict verdict_;
    Phase phase_ = Phase::arriving;
    int awaited_ = -1;
    std::size_t at_ = 0, end_ = 0;  // values of this rank's chunk still to reduce
    int gathered_ = 0;              // lanes whose chunk has been copied
    std::vector<const void*> in_;
};

}  // namespace bitring
