#include "execution.h"

#include <algorithm>
#include <iterator>
#include <map>

#include "copy.h"

namespace bitring {

int Execution::room(const Program& program) {
    int room = 0;
    for (const auto& stream : program.streams) room += std::min(program.window, int(stream.size()));
    return std::max(room, 1);
}

Execution::Execution(std::shared_ptr<const Program> program, std::unique_ptr<Wire> wire, int rank,
                     std::size_t itemsize, Reduce reduce)
    : program_(std::move(program)),
      wire_(std::move(wire)),
      rank_(rank),
      itemsize_(itemsize),
      reduce_(reduce),
      scratch_(new char[std::size_t(program_->slots) * std::size_t(program_->slot_values) * itemsize + 1]),
      untouched_(program_->messages.size()),
      waits_(program_->messages.size()),
      arrived_(program_->messages.size()),
      position_(program_->streams.size()),
      under_way_(program_->streams.size()),
      busy_(std::size_t(program_->slots)),
      wanting_(std::size_t(program_->slots)),
      landed_(std::size_t(room(*program_))) {
    find_untouched();
    for (std::size_t k = 0; k < program_->streams.size(); ++k) {
        if (!program_->messages[std::size_t(program_->streams[k][0])].sends) in_order_.push_back(int(k));
    }
    int peers = 0;
    for (const Message& m : program_->messages) peers = std::max(peers, m.peer + 1);
    peers_.resize(std::size_t(peers));
    for (auto& streams : wanting_) streams.reserve(program_->streams.size());
    todo_.reserve(program_->streams.size() + 1);
    finished_.reserve(program_->messages.size() + 1);
    taken_.reserve(program_->streams.size());
}

// Messages are in an order in which they could be done one by one.
void Execution::find_untouched() {
    std::map<std::int64_t, std::int64_t> changed;  // from a first value to the one after the last
    std::int64_t n = 0;
    bool mixed = false;
    for (std::size_t i = 0; i < program_->messages.size(); ++i) {
        const Message& m = program_->messages[i];
        n = std::max(n, m.stop);
        auto next = changed.upper_bound(m.start);
        const bool inside = next != changed.begin() && std::prev(next)->second > m.start;
        if (m.sends || m.reduces) {
            untouched_[i] = !inside && (next == changed.end() || next->first >= m.stop);
            mixed |= !untouched_[i] && !(inside && std::prev(next)->second >= m.stop);
        }
        if (m.sends) continue;
        std::int64_t start = m.start, stop = m.stop;
        if (next != changed.begin() && std::prev(next)->second >= start) --next;
        while (next != changed.end() && next->first <= stop) {
            start = std::min(start, next->first);
            stop = std::max(stop, next->second);
            next = changed.erase(next);
        }
        changed[start] = stop;
    }
    const bool all = n == 0 || (changed.size() == 1 && changed.begin()->first == 0 && changed.begin()->second == n);
    if (!mixed && all) return;
    copied_ = n;
    std::fill(untouched_.begin(), untouched_.end(), char(0));
}

void Execution::start() {
    if (copied_ > 0 && given_ != buffer_) copy_bytes(buffer_, given_, std::size_t(copied_) * itemsize_);
    const auto& messages = program_->messages;
    for (std::size_t i = 0; i < messages.size(); ++i) waits_[i] = messages[i].waits;
    std::fill(arrived_.begin(), arrived_.end(), char(0));
    std::fill(position_.begin(), position_.end(), std::size_t(0));
    std::fill(under_way_.begin(), under_way_.end(), 0);
    std::fill(busy_.begin(), busy_.end(), char(0));
    std::fill(peers_.begin(), peers_.end(), 0);
    for (auto& streams : wanting_) streams.clear();
    unfinished_ = messages.size();
    turn_ = 0;
    error_ = 0;
    awaited_ = -1;
    for (std::size_t k = 0; k < program_->streams.size(); ++k) begin_stream(int(k));
}

bool Execution::may_begin(int index) const {
    const Message& m = program_->messages[std::size_t(index)];
    const bool free = waits_[std::size_t(index)] == 0;
    if (m.sends || (m.early && free)) return free;
    const bool in_turn = turn_ == in_order_.size() || m.stream <= in_order_[turn_];
    return in_turn && (free || m.slot >= 0);
}

// Begin as many of the stream's messages as may begin now, and of the streams that this lets in.
void Execution::begin_stream(int first) {
    const std::size_t base = todo_.size();  // finish() calls this while an outer call's list is in use
    todo_.push_back(first);
    while (todo_.size() > base) {
        const int stream = todo_.back();
        todo_.pop_back();
        const auto& indices = program_->streams[std::size_t(stream)];
        while (position_[std::size_t(stream)] < indices.size() &&
               under_way_[std::size_t(stream)] < program_->window && error_ == 0) {
            const int index = indices[position_[std::size_t(stream)]];
            const Message& m = program_->messages[std::size_t(index)];
            if (!may_begin(index)) break;
            if (m.slot >= 0) {
                if (busy_[std::size_t(m.slot)]) {
                    auto& wanting = wanting_[std::size_t(m.slot)];
                    if (std::find(wanting.begin(), wanting.end(), stream) == wanting.end()) wanting.push_back(stream);
                    break;
                }
                busy_[std::size_t(m.slot)] = 1;
            }
            ++position_[std::size_t(stream)];
            ++under_way_[std::size_t(stream)];
            ++peers_[std::size_t(m.peer)];
            char* memory = m.sends ? const_cast<char*>(source(index)) : m.slot >= 0 ? scratch(m.slot) : at(m.start);
            error_ = wire_->start(m.sends, memory, std::size_t(m.stop - m.start) * itemsize_, m.peer, m.tag, index);
        }
        const std::size_t before = turn_;
        while (turn_ < in_order_.size()) {
            const auto k = std::size_t(in_order_[turn_]);
            if (position_[k] < program_->streams[k].size()) break;
            ++turn_;
        }
        if (before < turn_ && turn_ < in_order_.size()) todo_.push_back(in_order_[turn_]);
    }
}

// Take over what was received into scratch.
void Execution::apply(int index) {
    const Message& m = program_->messages[std::size_t(index)];
    if (m.slot < 0) return;
    const auto n = std::size_t(m.stop - m.start);
    void* mine = at(m.start);
    const void* theirs = scratch(m.slot);
    if (!m.reduces) {
        copy_bytes(mine, theirs, n * itemsize_);
        return;
    }
    // The lower rank's operand comes first, so that two ranks which add each other's values get the same bits.
    const void* operands[2] = {source(index), theirs};
    if (m.peer < rank_) std::swap(operands[0], operands[1]);
    reduce_(n, 2, operands, 1, &mine);
}

// The message has had its effect: free what it held, and go on with what waited for it.
void Execution::finish(int index) {
    const std::size_t base = finished_.size();
    finished_.push_back(index);
    while (finished_.size() > base) {
        index = finished_.back();
        finished_.pop_back();
        const Message& m = program_->messages[std::size_t(index)];
        --unfinished_;
        --under_way_[std::size_t(m.stream)];
        if (m.slot >= 0) {
            busy_[std::size_t(m.slot)] = 0;
            auto& wanting = wanting_[std::size_t(m.slot)];
            std::sort(wanting.begin(), wanting.end());
            const std::size_t taken = taken_.size();
            taken_.insert(taken_.end(), wanting.begin(), wanting.end());
            wanting.clear();
            const std::size_t end = taken_.size();
            for (std::size_t k = taken; k < end; ++k) begin_stream(taken_[k]);
            taken_.resize(taken);
        }
        for (const int later : program_->unblocks[std::size_t(index)]) {
            if (--waits_[std::size_t(later)] > 0) continue;
            if (arrived_[std::size_t(later)]) {
                apply(later);
                finished_.push_back(later);
            } else {
                begin_stream(program_->messages[std::size_t(later)].stream);
            }
        }
        begin_stream(m.stream);
    }
}

Status Execution::step() {
    int count = 0;
    if (error_ == 0) error_ = wire_->complete(landed_.data(), int(landed_.size()), &count);
    if (error_ != 0) return Status::failed;
    for (int k = 0; k < count; ++k) {
        const int index = landed_[std::size_t(k)];
        const Message& m = program_->messages[std::size_t(index)];
        --peers_[std::size_t(m.peer)];
        if (m.sends) {
            finish(index);
        } else if (waits_[std::size_t(index)] > 0) {
            arrived_[std::size_t(index)] = 1;
        } else {
            apply(index);
            finish(index);
        }
        if (error_ != 0) return Status::failed;
    }
    if (unfinished_ == 0) return Status::done;
    if (count > 0) return Status::moved;
    awaited_ = -1;
    for (std::size_t r = 0; r < peers_.size() && awaited_ < 0; ++r) {
        if (peers_[r] > 0) awaited_ = int(r);
    }
    return Status::waiting;
}

}  // namespace bitring
