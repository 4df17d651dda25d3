#include "nodes_roll_call.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "copy.h"

namespace bitring {

NodesRollCall::NodesRollCall(std::shared_ptr<Node> node, std::unique_ptr<Wire> wire, int rank, std::vector<int> leaders,
                             int tag)
    : node_(std::move(node)),
      wire_(std::move(wire)),
      rank_(rank),
      leader_(node_ ? node_->name(0) : rank),
      tag_(tag),
      inputs_(node_ ? std::size_t(node_->size()) : 0) {
    static_assert(kHead + Node::kSmall <= Node::kStage, "a stage holds what all ranks of a node are to hear");
    if (!leads()) {
        whole_ = node_->stage(0, 0);
        return;
    }
    const std::size_t room = kHead + kMost;
    memory_.reset(new char[3 * room + kHead]);
    char* aligned = memory_.get() + (kHead - reinterpret_cast<std::uintptr_t>(memory_.get()) % kHead) % kHead;
    whole_ = node_ ? node_->stage(0, 0) : aligned;
    out_ = aligned + room;
    in_ = aligned + 2 * room;
    const int size = int(leaders.size());
    const int mine = int(std::find(leaders.begin(), leaders.end(), rank) - leaders.begin());
    int doubling = 1;
    while (2 * doubling <= size) doubling *= 2;
    const int extra = size - doubling;
    const auto leader = [&](int k) { return leaders[std::size_t(k)]; };
    if (mine < 2 * extra && mine % 2 == 1) {
        rounds_.push_back({Turn::give, leader(mine - 1), false});
        rounds_.push_back({Turn::get_back, leader(mine - 1), false});
        return;
    }
    const bool folded = mine < 2 * extra;
    const int number = folded ? mine / 2 : mine - extra;
    if (folded) rounds_.push_back({Turn::take, leader(mine + 1), false});
    const auto partner = [&](int distance) {
        const int other = number ^ distance;
        return leader(other < extra ? 2 * other : other + extra);
    };
    for (int distance = 1; distance < doubling; distance *= 2, ++halving_rounds_) {
        rounds_.push_back({Turn::exchange, partner(distance), (number & distance) != 0});
    }
    for (int distance = doubling / 2; distance > 0; distance /= 2) {
        rounds_.push_back({Turn::spread, partner(distance), (number & distance) != 0});
    }
    if (folded) rounds_.push_back({Turn::hand_back, leader(mine + 1), false});
}

// This rank's values, with zeros for those that are not its own.
void NodesRollCall::fill(char* to) const {
    const std::size_t item = carried_.itemsize;
    std::memset(to, 0, carried_.own_first * item);
    copy_bytes(to + carried_.own_first * item, static_cast<const char*>(carried_.from) + carried_.own_first * item,
               (carried_.own_last - carried_.own_first) * item);
    std::memset(to + carried_.own_last * item, 0, (carried_.n - carried_.own_last) * item);
}

void NodesRollCall::arrive(const Intent& intent, const Carried* carried) {
    intent_ = intent;
    carried_ = carried != nullptr ? *carried : Carried{};
    error_ = 0;
    awaited_ = -1;
    under_way_ = 0;
    phase_ = leads() ? Phase::gathering : Phase::following;
    if (!node_) return;
    char* room = node_->prepare(intent, carried_.nbytes());
    if (carried_.n > 0) fill(room);
    node_->publish();
    ++node_->steps;
}

// All of this node have come: what they say together.
void NodesRollCall::gather() {
    Header& header = mine();
    header = Header{intent_.signature, carried_.nbytes(), intent_.flags, 1, 1};
    if (!node_) {
        if (carried_.n > 0) fill(values());
    } else {
        const Verdict verdict = node_->verdict();
        header.same = verdict.same;
        header.same_function = verdict.same_function;
        header.flags = verdict.flags;
        if (clean() && carried_.n > 0) {
            for (int r = 0; r < node_->size(); ++r) {
                inputs_[std::size_t(r)] = node_->contribution(r, carried_.nbytes());
            }
            void* to = values();
            carried_.reduce(carried_.n, inputs_.size(), inputs_.data(), 1, &to);
        }
    }
    first_ = 0;
    last_ = carried_.n;
    kept_.clear();
    round_ = 0;
    phase_ = Phase::leading;
    begin_round();
}

void NodesRollCall::send(const void* memory, std::size_t nbytes, int peer) {
    if (error_ != 0) return;
    error_ = wire_->start(true, const_cast<void*>(memory), nbytes, peer, tag_, 0);
    ++under_way_;
}

void NodesRollCall::receive(void* memory, std::size_t nbytes, int peer) {
    if (error_ != 0) return;
    error_ = wire_->start(false, memory, nbytes, peer, tag_, 1);
    ++under_way_;
}

void NodesRollCall::begin_round() {
    const std::size_t item = carried_.itemsize;
    for (; round_ < rounds_.size(); ++round_) {
        const Round& round = rounds_[round_];
        const std::size_t all = kHead + (clean() ? carried_.nbytes() : 0);
        awaited_ = round.peer;
        switch (round.turn) {
        case Turn::give:
        case Turn::hand_back:
            send(whole_, all, round.peer);
            return;
        case Turn::take:
        case Turn::get_back:
            receive(in_, kHead + kMost, round.peer);
            return;
        case Turn::exchange: {
            receive(in_, kHead + kMost, round.peer);
            kept_.emplace_back(first_, last_);
            if (!halves() || !clean()) {
                send(whole_, all, round.peer);
                return;
            }
            const std::size_t middle = first_ + (last_ - first_) / 2;
            const std::size_t from = round.upper ? first_ : middle, to = round.upper ? middle : last_;
            std::memcpy(out_, whole_, kHead);
            if (to > from) copy_bytes(out_ + kHead, values() + from * item, (to - from) * item);
            (round.upper ? first_ : last_) = middle;
            send(out_, kHead + (to - from) * item, round.peer);
            return;
        }
        case Turn::spread: {
            if (!halves() || !clean()) continue;
            const auto [from, to] = kept_.back();
            const std::size_t middle = from + (to - from) / 2;
            const std::size_t begin = round.upper ? from : middle, end = round.upper ? middle : to;
            receive(values() + begin * item, (end - begin) * item, round.peer);
            send(values() + first_ * item, (last_ - first_) * item, round.peer);
            return;
        }
        }
    }
}

// What a peer has said is taken into what is passed on, with its values, which are those from `first` to `last`.
void NodesRollCall::combine(std::size_t first, std::size_t last, int peer) {
    Header& header = mine();
    const Header& theirs = *reinterpret_cast<const Header*>(in_);
    header.flags |= theirs.flags;
    header.same_function &= theirs.same_function & std::uint8_t(header.signature >> 32 == theirs.signature >> 32);
    header.same &= theirs.same & std::uint8_t(header.signature == theirs.signature);
    header.same &= std::uint8_t(header.flags != 0 || header.nbytes == theirs.nbytes);
    if (!clean() || first == last) return;
    void* mine = values() + first * carried_.itemsize;
    const void* operands[2] = {mine, in_ + kHead};
    if (peer < rank_) std::swap(operands[0], operands[1]);
    carried_.reduce(last - first, 2, operands, 1, &mine);
}

void NodesRollCall::end_round() {
    const Round& round = rounds_[round_];
    switch (round.turn) {
    case Turn::take:
    case Turn::exchange:
        combine(first_, last_, round.peer);
        break;
    case Turn::get_back:
        std::memcpy(whole_, in_, sizeof(Header));
        if (clean() && carried_.n > 0) copy_bytes(values(), in_ + kHead, carried_.nbytes());
        break;
    case Turn::spread:
        std::tie(first_, last_) = kept_.back();
        kept_.pop_back();
        break;
    default:
        break;
    }
    ++round_;
    begin_round();
}

// Everything is known, and the values are there.
void NodesRollCall::conclude() {
    const Header& header = mine();
    verdict_ = Verdict{header.same != 0, header.same_function != 0, false, header.flags};
    if (carried_.n > 0 && clean()) copy_bytes(carried_.to, values(), carried_.nbytes());
}

Status NodesRollCall::step() {
    if (phase_ == Phase::following) {
        if (!node_->reached_by(0, 0, node_->steps)) {
            awaited_ = node_->all_arrived() ? leader_ : node_->name(node_->awaited());
            return Status::waiting;
        }
        conclude();
        return Status::done;
    }
    if (phase_ == Phase::gathering) {
        if (node_ && !node_->all_arrived()) {
            awaited_ = node_->name(node_->awaited());
            return Status::waiting;
        }
        gather();
    }
    while (error_ == 0) {
        if (under_way_ > 0) {
            int messages[kRoom], count = 0;
            error_ = wire_->complete(messages, kRoom, &count);
            under_way_ -= count;
            if (error_ != 0) break;
            if (under_way_ > 0) return count > 0 ? Status::moved : Status::waiting;
            end_round();
            continue;
        }
        conclude();
        if (node_) node_->report(0, node_->steps);
        return Status::done;
    }
    return Status::failed;
}

}  // namespace bitring
