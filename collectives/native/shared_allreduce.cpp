#include "shared_allreduce.h"

#include <algorithm>
#include <utility>

#include "copy.h"

namespace bitring {

namespace {

// What is reduced before others get a turn: about a millisecond's work.
constexpr std::size_t kPieceNbytes = 1 << 20;

// Chunks begin at multiples of 64 values, which is at cache lines when the buffer does.
std::size_t chunk_start(std::size_t n, std::size_t chunks, std::size_t c) {
    return c == chunks ? n : n / 64 * c / chunks * 64;
}

}  // namespace

std::size_t SharedAllreduce::small(int size) { return std::min(Node::kSmall, (std::size_t(64) << 10) / std::size_t(size)); }

SharedAllreduce::SharedAllreduce(std::shared_ptr<Node> node, const Intent& intent, std::vector<Operand> operands,
                                 std::shared_ptr<const Region> region)
    : node_(std::move(node)),
      intent_(intent),
      operands_(std::move(operands)),
      keep_(std::move(region)),
      region_(keep_.get()),
      in_(std::size_t(node_->size())),
      out_(std::size_t(node_->size()) + 1) {
    for (const Operand& operand : operands_) nbytes_ += operand.n * operand.itemsize;
}

void SharedAllreduce::rebind(const Intent& intent, const Carried& carried, const Region* region) {
    intent_ = intent;
    operands_.assign(1, Operand{carried.from, carried.to, carried.n, carried.itemsize, carried.reduce});
    region_ = region;
    nbytes_ = carried.nbytes();
}

void SharedAllreduce::start() {
    phase_ = Phase::arriving;
    if (nbytes_ > small(node_->size())) {
        node_->arrive(intent_, nullptr, 0);
    } else {
        char* room = node_->prepare(intent_, nbytes_);
        for (const Operand& operand : operands_) {
            if (operand.n == 0) continue;
            copy_bytes(room, operand.from, operand.n * operand.itemsize);
            room += operand.n * operand.itemsize;
        }
        node_->publish();
    }
}

Status SharedAllreduce::step() {
    switch (phase_) {
    case Phase::arriving:
        return arrived();
    case Phase::resident:
        return reduce_resident();
    case Phase::leaving:
        return node_->reached(0, node_->steps, &awaited_) ? Status::done : Status::waiting;
    default:
        return pass_stages();
    }
}

Status SharedAllreduce::arrived() {
    if (!node_->all_arrived()) {
        awaited_ = node_->awaited();
        return Status::waiting;
    }
    verdict_ = node_->verdict();
    if (!verdict_.same || verdict_.flags != 0) return Status::disagree;
    if (nbytes_ <= small(node_->size())) {
        reduce_small();
        return Status::done;
    }
    const auto size = std::size_t(node_->size());
    const Operand& operand = operands_[0];
    if (verdict_.same_place && region_ != nullptr) {
        const auto rank = std::size_t(node_->rank());
        at_ = chunk_start(operand.n, size, rank);
        end_ = chunk_start(operand.n, size, rank + 1);
        phase_ = Phase::resident;
        return Status::moved;
    }
    const std::size_t values = node_->stage_nbytes() / operand.itemsize / size * size;
    rounds_ = (operand.n + values - 1) / values;
    out_done_ = reduced_ = in_done_ = 0;
    phase_ = Phase::staged;
    return Status::moved;
}

void SharedAllreduce::reduce_small() {
    const int size = node_->size();
    std::size_t offset = 0;
    for (const Operand& operand : operands_) {
        for (int r = 0; r < size; ++r) {
            in_[std::size_t(r)] = static_cast<const char*>(node_->contribution(r, nbytes_)) + offset;
        }
        void* to = operand.to;
        operand.reduce(operand.n, std::size_t(size), in_.data(), 1, &to);
        offset += operand.n * operand.itemsize;
    }
}

Status SharedAllreduce::reduce_resident() {
    const Operand& operand = operands_[0];
    const int size = node_->size();
    const std::size_t n = std::min(end_ - at_, kPieceNbytes / operand.itemsize);
    const std::size_t first = backwards_ ? end_ - n : at_;
    const auto offset =
        std::size_t(static_cast<char*>(operand.to) - region_->part(region_->rank())) + first * operand.itemsize;
    for (int r = 0; r < size; ++r) {
        in_[std::size_t(r)] = region_->part(r) + offset;
        out_[std::size_t(r)] = region_->part(r) + offset;
    }
    operand.reduce(n, std::size_t(size), in_.data(), std::size_t(size), out_.data());
    (backwards_ ? end_ : at_) = backwards_ ? first : first + n;
    if (at_ == end_) {
        backwards_ = !backwards_;
        node_->report(0, ++node_->steps);
        phase_ = Phase::leaving;
    }
    return Status::moved;
}

void SharedAllreduce::chunk(std::size_t round, int r, std::size_t* first, std::size_t* last) const {
    const auto size = std::size_t(node_->size());
    const Operand& operand = operands_[0];
    const std::size_t values = node_->stage_nbytes() / operand.itemsize / size * size;
    const std::size_t begin = round * values;
    const std::size_t n = std::min(values, operand.n - begin);
    *first = begin + chunk_start(n, size, std::size_t(r));
    *last = begin + chunk_start(n, size, std::size_t(r) + 1);
}

// The three parts of a round wait for the others' parts before them; this rank takes whichever it can, the oldest
// round first. A stage is used again when all have copied what they need from it.
Status SharedAllreduce::pass_stages() {
    const std::uint64_t base = node_->steps;
    if (in_done_ < reduced_ && node_->reached(1, base + in_done_ + 1, &awaited_)) {
        copy_in(in_done_);
        node_->report(2, base + ++in_done_);
        if (in_done_ < rounds_) return Status::moved;
        node_->steps += rounds_;
        return Status::done;
    }
    if (reduced_ < out_done_ && node_->reached(0, base + reduced_ + 1, &awaited_)) {
        reduce_stage(reduced_);
        node_->report(1, base + ++reduced_);
        return Status::moved;
    }
    if (out_done_ < rounds_ && out_done_ < in_done_ + Node::kStages &&
        (out_done_ < Node::kStages || node_->reached(2, base + out_done_ + 1 - Node::kStages, &awaited_))) {
        copy_out(out_done_);
        node_->report(0, base + ++out_done_);
        return Status::moved;
    }
    return Status::waiting;
}

// A chunk keeps its place in the stage: that of its values in the round.
void SharedAllreduce::copy_out(std::size_t round) {
    const Operand& operand = operands_[0];
    char* stage = node_->stage(node_->rank(), round);
    std::size_t begin, first, last;
    chunk(round, 0, &begin, &last);
    for (int r = 0; r < node_->size(); ++r) {
        if (r == node_->rank()) continue;
        chunk(round, r, &first, &last);
        copy_bytes(stage + (first - begin) * operand.itemsize,
                    static_cast<const char*>(operand.from) + first * operand.itemsize, (last - first) * operand.itemsize);
    }
}

void SharedAllreduce::reduce_stage(std::size_t round) {
    const Operand& operand = operands_[0];
    const int rank = node_->rank();
    std::size_t begin, first, last;
    chunk(round, 0, &begin, &last);
    chunk(round, rank, &first, &last);
    const std::size_t offset = (first - begin) * operand.itemsize;
    for (int r = 0; r < node_->size(); ++r) in_[std::size_t(r)] = node_->stage(r, round) + offset;
    in_[std::size_t(rank)] = static_cast<const char*>(operand.from) + first * operand.itemsize;
    out_[0] = static_cast<char*>(operand.to) + first * operand.itemsize;
    out_[1] = node_->stage(rank, round) + offset;
    operand.reduce(last - first, in_.size(), in_.data(), 2, out_.data());
}

void SharedAllreduce::copy_in(std::size_t round) {
    const Operand& operand = operands_[0];
    std::size_t begin, first, last;
    chunk(round, 0, &begin, &last);
    for (int r = 0; r < node_->size(); ++r) {
        if (r == node_->rank()) continue;
        chunk(round, r, &first, &last);
        copy_bytes(static_cast<char*>(operand.to) + first * operand.itemsize,
                    node_->stage(r, round) + (first - begin) * operand.itemsize, (last - first) * operand.itemsize);
    }
}

}  // namespace bitring
