#include "lane_allreduce.h"

#include <algorithm>
#include <utility>

#include "copy.h"

namespace bitring {

namespace {

constexpr std::size_t kPieceNbytes = 1 << 20;

}  // namespace

LaneAllreduce::LaneAllreduce(std::shared_ptr<Node> node, const Intent& intent, void* buffer, std::size_t n,
                             std::size_t itemsize, Reduce reduce, std::shared_ptr<const Region> region, int lanes,
                             std::shared_ptr<Operation> between)
    : node_(std::move(node)),
      intent_(intent),
      given_(static_cast<char*>(buffer)),
      buffer_(static_cast<char*>(buffer)),
      n_(n),
      itemsize_(itemsize),
      reduce_(reduce),
      region_(std::move(region)),
      resident_(region_->holds(buffer, n * itemsize)),
      offset_(resident_ ? std::size_t(buffer_ - region_->part(region_->rank())) : 0),
      lanes_(lanes),
      between_(std::move(between)),
      in_(std::size_t(node_->size())) {}

void LaneAllreduce::start() {
    if (!resident_ && n_ > 0) copy_bytes(part(node_->rank()), given_, n_ * itemsize_);
    at_ = between_ ? chunk_start(n_, lanes_, node_->rank()) : 0;
    end_ = between_ ? chunk_start(n_, lanes_, node_->rank() + 1) : 0;
    gathered_ = 0;
    phase_ = Phase::arriving;
    node_->arrive(intent_, nullptr, 0);
}

Status LaneAllreduce::step() {
    const int rank = node_->rank();
    switch (phase_) {
    case Phase::arriving:
        if (!node_->all_arrived()) {
            awaited_ = node_->awaited();
            return Status::waiting;
        }
        verdict_ = node_->verdict();
        if (!verdict_.same || verdict_.flags != 0) return Status::disagree;
        phase_ = Phase::reducing;
        return Status::moved;
    case Phase::reducing:
        if (at_ < end_) {
            const std::size_t n = std::min(end_ - at_, kPieceNbytes / itemsize_);
            for (int r = 0; r < node_->size(); ++r) in_[std::size_t(r)] = part(r) + at_ * itemsize_;
            void* mine = part(rank) + at_ * itemsize_;
            reduce_(n, in_.size(), in_.data(), 1, &mine);
            at_ += n;
            return Status::moved;
        }
        if (between_) between_->begin();
        phase_ = Phase::between;
        return Status::moved;
    case Phase::between:
        if (between_) {
            const Status status = between_->advance();
            if (status == Status::failed) return status;
            if (status != Status::done) {
                awaited_ = -1;
                return status;
            }
        }
        node_->report(0, ++node_->steps);
        phase_ = Phase::gathering;
        return Status::moved;
    case Phase::gathering:
        // All chunks are there when all have reported: those without a lane as soon as they have come.
        if (!node_->reached(0, node_->steps, &awaited_)) return Status::waiting;
        if (gathered_ < lanes_) {
            const std::size_t first = chunk_start(n_, lanes_, gathered_), last = chunk_start(n_, lanes_, gathered_ + 1);
            char* to = resident_ ? part(rank) : buffer_;
            if (last > first && !(resident_ && gathered_ == rank)) {
                copy_bytes(to + first * itemsize_, part(gathered_) + first * itemsize_, (last - first) * itemsize_);
            }
            ++gathered_;
            return Status::moved;
        }
        node_->report(1, node_->steps);
        phase_ = Phase::leaving;
        return Status::moved;
    default:
        // Others still read this rank's part, which is the caller's when this is over.
        return node_->reached(1, node_->steps, &awaited_) ? Status::done : Status::waiting;
    }
}

}  // namespace bitring
