#include "nodes_roll_call.h"

#include <algorithm>
#include <cstring>
#include <tuple>
#include <utility>

#include "copy.h"

namespace bitring {

NodesRollCall::NodesRollCall(std::shared_ptr<Node> node, std::unique_ptr<Wire> wire, int rank,
                             const std::vector<std::vector<int>>& nodes, int tag)
    : node_(std::move(node)),
      wire_(std::move(wire)),
      rank_(rank),
      leader_(node_ ? node_->name(0) : rank),
      tag_(tag),
      inputs_(node_ ? std::size_t(node_->size()) : 0) {
    static_assert(kHead + Node::kSmall <= Node::kStage, "a stage holds what all ranks of a node are to hear");
    const int size = int(nodes.size());
    int mine = 0, ranks = 0, rounds = 0;
    while (2 << rounds <= size) ++rounds;
    const int doubling = 1 << rounds, extra = size - doubling;
    for (int k = 0; k < size; ++k) {
        ranks += int(nodes[std::size_t(k)].size());
        leaders_.push_back(nodes[std::size_t(k)][0]);
        if (leaders_.back() == leader_) mine = k;
    }
    own_node_ = mine;
    doubling_ = doubling;
    extra_ = extra;
    node_of_.resize(std::size_t(ranks));
    for (int k = 0; k < size; ++k) {
        for (int r : nodes[std::size_t(k)]) node_of_[std::size_t(r)] = k;
    }
    members_ = nodes[std::size_t(mine)];
    gathered_.resize(std::size_t(ranks));
    scattered_.resize(std::size_t(ranks));
    int place = 0;
    for (const std::vector<int>& node : nodes) {
        for (int r : node) gathered_[std::size_t(r)] = place++;
    }
    // Each round of a reduce_scatter halves what is left by a bit of the numbers of those that exchange, the lowest first.
    const auto reversed = [&](int number) {
        int result = 0;
        for (int bit = 0; bit < rounds; ++bit) result |= (number >> bit & 1) << (rounds - 1 - bit);
        return result;
    };
    std::vector<int> starts;
    place = 0;
    for (int k = 0; k < doubling; ++k) {
        starts.push_back(place);
        const int number = reversed(k);
        for (int l = number < extra ? 2 * number : number + extra, last = number < extra ? l + 1 : l; l <= last; ++l) {
            for (int r : nodes[std::size_t(l)]) scattered_[std::size_t(r)] = place++;
        }
    }
    starts.push_back(place);

    if (node_) shared_ = node_->stage(0, 0);
    if (!leads()) {
        whole_ = shared_;
        return;
    }
    const std::size_t room = kHead + kMost;
    memory_.reset(new char[3 * room + kHead]);
    char* aligned = memory_.get() + (kHead - reinterpret_cast<std::uintptr_t>(memory_.get()) % kHead) % kHead;
    own_ = aligned;
    whole_ = node_ ? shared_ : own_;
    out_ = aligned + room;
    in_ = aligned + 2 * room;
    const auto leader = [&](int k) { return nodes[std::size_t(k)][0]; };
    if (mine < 2 * extra && mine % 2 == 1) {
        rounds_.push_back({Turn::give, leader(mine - 1)});
        rounds_.push_back({Turn::get_back, leader(mine - 1)});
        return;
    }
    const bool folded = mine < 2 * extra;
    const int number = folded ? mine / 2 : mine - extra;
    if (folded) rounds_.push_back({Turn::take, leader(mine + 1)});
    const auto partner = [&](int distance) {
        const int other = number ^ distance;
        return leader(other < extra ? 2 * other : other + extra);
    };
    int begin = 0, end = doubling;  // of `starts`: what this rank keeps
    for (int distance = 1; distance < doubling; distance *= 2, ++halving_rounds_) {
        const int middle = (begin + end) / 2;
        const bool upper = (number & distance) != 0;
        rounds_.push_back({Turn::exchange, partner(distance), upper, starts[std::size_t(middle)]});
        (upper ? begin : end) = middle;
    }
    for (int distance = doubling / 2; distance > 0; distance /= 2) {
        rounds_.push_back({Turn::spread, partner(distance), (number & distance) != 0});
    }
    if (folded) {
        const int first = starts[std::size_t(begin)] + int(members_.size());
        rounds_.push_back({Turn::hand_back, leader(mine + 1), false, first, starts[std::size_t(end)]});
    }
}

// A binomial tree of the pairs that exchange: the root tells the others, or all add what they have on the way to it.
void NodesRollCall::make_one_way_rounds() {
    one_way_rounds_.clear();
    const bool sums = repeated_ == Collective::reduce;
    const int root = node_of_[std::size_t(repeated_root_)], mine = own_node_;
    const auto leader = [&](int k) { return leaders_[std::size_t(k)]; };
    const auto is_extra = [&](int k) { return k < 2 * extra_ && k % 2 == 1; };
    const auto number = [&](int k) { return k < 2 * extra_ ? k / 2 : k - extra_; };
    const auto numbered = [&](int n) { return leader(n < extra_ ? 2 * n : n + extra_); };
    std::vector<Round>& rounds = one_way_rounds_;
    if (is_extra(mine)) {
        const int neighbour = leader(mine - 1);
        if (sums || mine == root) rounds.push_back({Turn::tell, neighbour});
        if (!sums != (mine == root)) rounds.push_back({Turn::hear, neighbour});
        return;
    }
    const int distance = number(mine) ^ number(root), nearest = distance & -distance;
    const bool folded = mine < 2 * extra_, neighbours_root = is_extra(root) && root == mine + 1;
    if (sums) {
        if (folded) rounds.push_back({Turn::add, leader(mine + 1)});
        for (int d = 1; d < (distance == 0 ? doubling_ : nearest); d *= 2) {
            rounds.push_back({Turn::add, numbered(number(mine) ^ d)});
        }
        if (distance != 0) rounds.push_back({Turn::tell, numbered(number(mine) ^ nearest)});
        if (neighbours_root) rounds.push_back({Turn::tell, leader(root)});
        return;
    }
    if (neighbours_root) rounds.push_back({Turn::hear, leader(root)});
    if (distance != 0) rounds.push_back({Turn::hear, numbered(number(mine) ^ nearest)});
    for (int d = (distance == 0 ? doubling_ : nearest) / 2; d > 0; d /= 2) {
        rounds.push_back({Turn::tell, numbered(number(mine) ^ d)});
    }
    if (folded && !neighbours_root) rounds.push_back({Turn::tell, leader(mine + 1)});
}

bool NodesRollCall::knows(std::uint64_t signature) const {
    const auto& known = repeated_signatures_;
    return place_.calls.size() < kAhead && std::find(known.begin(), known.end(), signature) != known.end();
}

bool NodesRollCall::repeats(std::uint64_t signature) const {
    const std::lock_guard<std::mutex> lock(place_mutex_);
    return knows(signature);
}

bool NodesRollCall::repeating() const {
    const std::lock_guard<std::mutex> lock(place_mutex_);
    return !repeated_signatures_.empty();
}

NodesRollCall::Place NodesRollCall::place() const {
    const std::lock_guard<std::mutex> lock(place_mutex_);
    Place place = place_;
    if (inside_) place.calls.push_back(intent_.signature);
    place.meets = inside_ && !one_way_;
    return place;
}

void NodesRollCall::arrive(const Intent& intent, const Carried* carried) {
    carried_ = carried != nullptr ? *carried : Carried{};
    {
        const std::lock_guard<std::mutex> lock(place_mutex_);
        intent_ = intent;
        inside_ = true;
        one_way_ = intent.flags == 0 && may_go_one_way(carried_) && knows(intent.signature);
    }
    error_ = 0;
    awaited_ = -1;
    under_way_ = 0;
    phase_ = leads() ? Phase::gathering : Phase::following;
    if (!node_) return;
    source_ = -1;
    if (one_way_ && carried_.collective == Collective::broadcast) {
        const auto root = std::find(members_.begin(), members_.end(), carried_.root);
        source_ = root == members_.end() ? 0 : int(root - members_.begin());
    }
    if (leads()) whole_ = source_ < 0 ? shared_ : own_;  // who is late may still read what the last call has left there
    Intent said = intent;
    said.where = std::uint64_t(1) << 32 | history_;
    if (one_way_) said.flags |= kGoesOn;
    char* room = node_->prepare(said, carried_.given_nbytes(ranks()));
    if (carried_.gives(rank_)) give(carried_, places(), room);
    if (!leads() || !tells_late()) node_->publish();
    ++node_->steps;
}

// All of this node have come: what they say together.
void NodesRollCall::gather() {
    Header& header = mine();
    header = Header{intent_.signature, carried_.nbytes(), 0, intent_.flags, 0, 0, history_, -1, 1, 1, 0};
    if (source_ >= 0) {
        header.same = node_->rank() == source_ || tells_late() || node_->says_the_same(source_);
        if (header.same == 0) {
            header.stranger = node_->name(source_);
            header.strange = node_->signature(source_);
        }
    } else if (node_) {
        const Verdict verdict = node_->verdict();
        header.same = verdict.same && verdict.same_place;
        header.same_function = verdict.same_function;
        header.flags = verdict.flags;
        header.stranger = verdict.stranger;
        header.strange = verdict.strange;
        if (one_way_ && !clean()) header.stranger = node_->name(node_->differing(&header.strange));
    }
    first_ = last_ = 0;
    if (header.stranger >= 0) {  // other nodes may not wait to hear of this one's ranks
        header.same = 0;
        round_ = rounds().size();
        phase_ = Phase::leading;
        return;
    }
    header.one_way = one_way_;
    if (clean() && carried_.n > 0) gather_values();
    kept_.clear();
    round_ = 0;
    phase_ = Phase::leading;
    begin_round();
}

// What the ranks of this node give.
void NodesRollCall::gather_values() {
    const std::size_t nbytes = carried_.given_nbytes(ranks());
    const auto given = [&](std::size_t k) { return node_->contribution(int(k), nbytes); };
    const std::size_t own = node_ ? std::size_t(node_->size()) : 1, size = carried_.n / ranks();
    last_ = carried_.n;
    switch (carried_.collective) {
    case Collective::broadcast:
        for (std::size_t k = 0; k < own; ++k) {
            if (members_[k] != carried_.root) continue;
            node_ ? copy_bytes(values(), given(k), nbytes) : give(carried_, places(), values());
            return;
        }
        last_ = 0;
        return;
    case Collective::allgather:
        first_ = std::size_t(gathered_[std::size_t(leader_)]) * size;
        last_ = first_ + own * size;
        for (std::size_t k = 0; k < own; ++k) {
            char* to = block(gathered_[std::size_t(members_[k])]);
            node_ ? copy_bytes(to, given(k), nbytes) : give(carried_, places(), to);
        }
        return;
    default:
        if (!node_) {
            give(carried_, places(), values());
            return;
        }
        for (std::size_t k = 0; k < own; ++k) inputs_[k] = given(k);
        void* to = values();
        carried_.reduce(carried_.n, own, inputs_.data(), 1, &to);
    }
}

void NodesRollCall::send(const void* memory, std::size_t nbytes, int peer) {
    if (error_ != 0) return;
    error_ = wire_->start(true, const_cast<void*>(memory), nbytes, peer, tag_, kSent);
    ++under_way_;
}

void NodesRollCall::receive(void* memory, std::size_t nbytes, int peer) {
    if (error_ != 0) return;
    error_ = wire_->start(false, memory, nbytes, peer, tag_, kReceived);
    ++under_way_;
}

// A message with the values from `first` to `last`, where all mean the same as far as is known.
void NodesRollCall::send_values(std::size_t first, std::size_t last, int peer) {
    const std::size_t item = carried_.itemsize;
    if (!clean() || first == last) first = last = 0;
    mine().first = std::uint32_t(first);
    mine().last = std::uint32_t(last);
    if (first == 0) {
        send(whole_, kHead + last * item, peer);
        return;
    }
    std::memcpy(out_, whole_, sizeof(Header));
    copy_bytes(out_ + kHead, values() + first * item, (last - first) * item);
    send(out_, kHead + (last - first) * item, peer);
}

void NodesRollCall::begin_round() {
    const std::size_t item = carried_.itemsize, size = carried_.n / ranks();
    for (; round_ < rounds().size(); ++round_) {
        const Round& round = rounds()[round_];
        awaited_ = round.peer;
        switch (round.turn) {
        case Turn::give:
            send_values(first_, last_, round.peer);
            return;
        case Turn::hand_back:
            if (scatters()) {
                send_values(std::size_t(round.first) * size, std::size_t(round.last) * size, round.peer);
            } else {
                send_values(0, carried_.n, round.peer);
            }
            return;
        case Turn::take:
        case Turn::get_back:
        case Turn::add:
        case Turn::hear:
            receive(in_, kHead + kMost, round.peer);
            return;
        case Turn::tell:
            send_values(first_, last_, round.peer);
            if (round_ + 1 < rounds().size() && rounds()[round_ + 1].turn == Turn::tell) continue;
            return;
        case Turn::exchange: {
            receive(in_, kHead + kMost, round.peer);
            if (!halves() || !clean()) {
                send_values(first_, last_, round.peer);
                return;
            }
            kept_.emplace_back(first_, last_);
            const std::size_t middle = scatters() ? std::size_t(round.first) * size : first_ + (last_ - first_) / 2;
            const std::size_t from = round.upper ? first_ : middle, to = round.upper ? middle : last_;
            (round.upper ? first_ : last_) = middle;
            send_values(from, to, round.peer);
            return;
        }
        case Turn::spread: {
            if (!halves() || scatters() || !clean()) continue;
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

// Whether the message that came in the round is of a rank that does something else, and does not wait for an answer, or
// waits for one that it will not get.
bool NodesRollCall::is_strange() const {
    const Turn turn = rounds()[round_].turn;
    if (turn == Turn::spread) return false;  // who comes to that has met this rank before, in this call
    const Header& theirs = *reinterpret_cast<const Header*>(in_);
    if (!one_way_) return theirs.one_way != 0;
    return theirs.one_way == 0 || theirs.signature != mine().signature || theirs.history != mine().history;
}

// What a peer has said is taken into what is passed on, with its values.
void NodesRollCall::merge(int peer) {
    Header& header = mine();
    const Header& theirs = *reinterpret_cast<const Header*>(in_);
    header.flags |= theirs.flags;
    header.same_function &= theirs.same_function & std::uint8_t(header.signature >> 32 == theirs.signature >> 32);
    header.same &= theirs.same & std::uint8_t(header.signature == theirs.signature);
    header.same &= std::uint8_t(header.flags != 0 || header.nbytes == theirs.nbytes);
    header.same &= std::uint8_t(header.history == theirs.history);
    if (!clean() || theirs.first == theirs.last) return;
    const std::size_t item = carried_.itemsize;
    void* here = values() + theirs.first * item;
    if (!carried_.reduces()) {
        copy_bytes(static_cast<char*>(here), in_ + kHead, (theirs.last - theirs.first) * item);
        const bool had = first_ < last_;
        first_ = had ? std::min<std::size_t>(first_, theirs.first) : theirs.first;
        last_ = had ? std::max<std::size_t>(last_, theirs.last) : theirs.last;
        return;
    }
    const void* operands[2] = {here, in_ + kHead};
    if (peer < rank_) std::swap(operands[0], operands[1]);
    carried_.reduce(theirs.last - theirs.first, 2, operands, 1, &here);
}

void NodesRollCall::end_round() {
    const Round& round = rounds()[round_];
    switch (round.turn) {
    case Turn::take:
    case Turn::exchange:
    case Turn::add:
        merge(round.peer);
        break;
    case Turn::hear:
    case Turn::get_back:
        std::memcpy(whole_, in_, sizeof(Header));
        if (clean()) {
            const std::size_t item = carried_.itemsize, first = mine().first, last = mine().last;
            copy_bytes(values() + first * item, in_ + kHead, (last - first) * item);
            if (one_way_) last_ = last;
        }
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
    const bool itself = header.stranger == rank_;
    verdict_ = Verdict{header.same != 0, header.same_function != 0, false, header.flags,
                       itself ? leader_ : header.stranger, itself ? header.signature : header.strange, {}};
    if (carried_.n > 0 && clean()) take(carried_, rank_, places(), values());
    note();
}

// What is to be remembered of a call that is over.
void NodesRollCall::note() {
    const std::lock_guard<std::mutex> lock(place_mutex_);
    inside_ = false;
    if (verdict_.same && one_way_) {
        place_.calls.push_back(intent_.signature);
        history_ = std::uint32_t(((history_ ^ intent_.signature) + place_.calls.size()) * 0x9e3779b97f4a7c15u >> 32);
        return;
    }
    if (!verdict_.same) verdict_.earlier = place_.calls;
    if (verdict_.stranger >= 0) return;  // not all have met
    ++place_.meetings;
    place_.calls.clear();
    history_ = 0;
    if (!verdict_.same) {
        repeated_root_ = -1;
        repeated_signatures_.clear();
        return;
    }
    if (verdict_.flags != 0 || intent_.signature == 0 || !may_go_one_way(carried_)) return;
    auto& known = repeated_signatures_;
    if (repeated_root_ != carried_.root || repeated_ != carried_.collective) {
        repeated_ = carried_.collective;
        repeated_root_ = carried_.root;
        known.clear();
        make_one_way_rounds();
    }
    if (std::find(known.begin(), known.end(), intent_.signature) != known.end()) return;
    if (known.size() == kRepeated) known.erase(known.begin());
    known.push_back(intent_.signature);
}

// As conclude(), where there is no header. `stranger`: of this node's ranks; -1: none.
void NodesRollCall::conclude_alone(int stranger) {
    verdict_ = Verdict{};
    if (stranger >= 0) {
        verdict_.same = false;
        verdict_.stranger = node_->name(stranger);
        verdict_.strange = node_->signature(stranger);
        if ((node_->flags(stranger) & kStrange) != 0) {
            const auto* told = static_cast<const Strange*>(node_->contribution(stranger, sizeof(Strange)));
            if (told->rank != rank_) verdict_.stranger = told->rank, verdict_.strange = told->signature;
        }
        verdict_.same_function = verdict_.strange >> 32 == intent_.signature >> 32;
        verdict_.flags = node_->flags(stranger) & kBad;
    }
    note();
}

// Whether a rank that does not lead has come to the end of the call.
bool NodesRollCall::has_followed() {
    const bool gets = carried_.collective == Collective::broadcast ? rank_ != carried_.root : rank_ == carried_.root;
    if (one_way_ && !gets) {
        conclude_alone(-1);
        return true;
    }
    const int from = std::max(source_, 0);
    const bool there = source_ >= 0 ? node_->has_arrived(from) : node_->reached_by(0, 0, node_->steps);
    // Who has come to another call may have gone on.
    const bool strange = node_->has_arrived(from) && !node_->says_the_same(from) &&
                         (one_way_ || (node_->flags(from) & kGoesOn) != 0);
    if (strange) {
        conclude_alone(from);
    } else if (!there) {
        awaited_ = source_ >= 0 || node_->all_arrived() ? node_->name(from) : node_->name(node_->awaited());
        return false;
    } else if (source_ >= 0) {
        take(carried_, rank_, places(), static_cast<const char*>(node_->contribution(from, carried_.nbytes())));
        conclude_alone(-1);
    } else {
        conclude();
    }
    return true;
}

// What has come from another node, or that it has not, to the ranks of this one.
void NodesRollCall::tell_node() {
    if (clean()) {
        copy_bytes(node_->room(carried_.nbytes()), values(), carried_.nbytes());
    } else {
        const Strange told{mine().stranger, mine().strange};
        std::memcpy(node_->room(sizeof told), &told, sizeof told);
        node_->add_flag(kStrange);
        if ((mine().flags & kBad) != 0) node_->add_flag(kBad);
    }
    node_->publish();
}

// Whoever has not waited for all ranks of the node must not be too far ahead of them.
Status NodesRollCall::leave() {
    int r;
    if (!one_way_ || !node_ || !verdict_.same || node_->has_room(&r)) return Status::done;
    phase_ = Phase::leaving;
    awaited_ = node_->name(r);
    return Status::waiting;
}

Status NodesRollCall::step() {
    if (phase_ == Phase::leaving) return leave();
    if (phase_ == Phase::following) return has_followed() ? leave() : Status::waiting;
    if (phase_ == Phase::gathering) {
        const bool there = source_ >= 0 ? tells_late() || node_->has_arrived(source_) : !node_ || node_->all_arrived();
        if (!there) {
            awaited_ = node_->name(source_ >= 0 ? source_ : node_->awaited());
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
            if (std::find(messages, messages + count, kReceived) != messages + count && is_strange()) {
                Header& header = mine();
                header.same = 0;
                header.stranger = rounds()[round_].peer;
                header.strange = reinterpret_cast<const Header*>(in_)->signature;
                header.flags |= reinterpret_cast<const Header*>(in_)->flags & kBad;
                under_way_ = 0;  // what is sent may never be received
                continue;
            }
            if (under_way_ > 0) return count > 0 ? Status::moved : Status::waiting;
            end_round();
            continue;
        }
        if (source_ >= 0 && tells_late()) tell_node();
        conclude();
        if (node_) node_->report(0, node_->steps);
        return leave();
    }
    return Status::failed;
}

}  // namespace bitring
