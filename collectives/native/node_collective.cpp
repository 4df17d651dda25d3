#include "node_collective.h"

#include <numeric>
#include <utility>

#include "copy.h"

namespace bitring {

NodeCollective::NodeCollective(std::shared_ptr<Node> node)
    : node_(std::move(node)), places_(std::size_t(node_->size())), inputs_(places_.size()) {
    std::iota(places_.begin(), places_.end(), 0);
}

void NodeCollective::start() {
    char* room = node_->prepare(intent_, carried_.given_nbytes(places_.size()));
    if (carried_.gives(node_->rank())) give(carried_, places_, room);
    node_->publish();
}

// The sums of n values of all ranks, from `offset` bytes of what each gives on.
void NodeCollective::reduce_from(std::size_t offset, std::size_t n) {
    for (std::size_t r = 0; r < inputs_.size(); ++r) inputs_[r] = given(int(r)) + offset;
    carried_.reduce(n, inputs_.size(), inputs_.data(), 1, &carried_.to);
}

Status NodeCollective::step() {
    if (!node_->all_arrived()) return Status::waiting;
    verdict_ = node_->verdict();
    if (!verdict_.same || verdict_.flags != 0) return Status::disagree;
    if (carried_.n == 0) return Status::done;
    const std::size_t ranks = places_.size(), block = carried_.block_nbytes(ranks);
    const int rank = node_->rank();
    switch (carried_.collective) {
    case Collective::broadcast:
        if (rank != carried_.root) copy_bytes(carried_.to, given(carried_.root), carried_.nbytes());
        break;
    case Collective::allgather:
        for (std::size_t r = 0; r < ranks; ++r) {
            copy_bytes(static_cast<char*>(carried_.to) + r * carried_.stride * carried_.itemsize, given(int(r)), block);
        }
        break;
    case Collective::reduce_scatter:
        reduce_from(std::size_t(rank) * block, carried_.n / ranks);
        break;
    case Collective::reduce:
        if (rank == carried_.root) reduce_from(0, carried_.n);
        break;
    case Collective::allreduce:
        reduce_from(0, carried_.n);
        break;
    }
    return Status::done;
}

}  // namespace bitring
