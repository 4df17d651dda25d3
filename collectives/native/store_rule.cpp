#include "store_rule.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

namespace bitring {

StoreRule::StoreRule(std::optional<std::int64_t> staleness, bool inverse, std::vector<std::int64_t> clocks)
    : staleness_(staleness), inverse_(inverse) {
    for (const std::int64_t clock : clocks) members_.push_back(Member{clock, 0, clock > 0});
}

std::size_t StoreRule::at(int member) const {
    if (member < 0 || std::size_t(member) >= members_.size()) throw std::out_of_range("StoreRule: no such member");
    return std::size_t(member);
}

StoreRule::Actions StoreRule::push(int member, int number, double weight, std::optional<std::int64_t> round) {
    Actions actions;
    const std::int64_t read = round.value_or(members_[at(member)].seen);
    if (weight != 0) {  // else a step without samples
        StoreAction apply{StoreAction::Kind::apply, member, number};
        apply.staleness = version_ - read;
        if (inverse_) apply.scale = 1.0 / double(std::max<std::int64_t>(1, apply.staleness));
        ++version_;
        actions.push_back(std::move(apply));
    }
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::read(int member, int ticket, std::optional<std::int64_t> least) {
    Actions actions;
    Member& reader = members_[at(member)];
    Read read{member, ticket, kAny};
    if (least) {
        read.least = *least;
    } else if (staleness_ && !reader.left) {
        read.least = reader.clock - *staleness_;
    }
    const auto earlier = std::find_if(waiting_.begin(), waiting_.end(), [&](const Read& r) { return r.member == member; });
    if (earlier == waiting_.end()) {
        waiting_.push_back(read);
    } else {
        *earlier = read;
    }
    proceed(actions);
    for (const Read& waits : waiting_) {
        if (waits.member != member) continue;
        StoreAction defer{StoreAction::Kind::defer, member, ticket};
        for (std::size_t m = 0; m < members_.size(); ++m) {
            if (members_[m].at_work() && members_[m].clock < waits.least) defer.members.push_back(int(m));
        }
        actions.push_back(std::move(defer));
    }
    return actions;
}

StoreRule::Actions StoreRule::claim(int member, int ticket, const std::vector<std::int64_t>& row) {
    StoreAction claim{StoreAction::Kind::claim, member, ticket};
    claim.claimed = claimed_.try_emplace(row, -1).first->second += 1;
    return {std::move(claim)};
}

StoreRule::Actions StoreRule::clock(int member) {
    Actions actions;
    ++members_[at(member)].clock;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::leave(int member) {
    Actions actions;
    members_[at(member)].left = true;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::rest(int member) {
    Actions actions;
    members_[at(member)].resting = true;
    proceed(actions);
    return actions;
}

StoreRule::Actions StoreRule::end(int member) {
    Actions actions;
    members_[at(member)].ended = true;
    drop_read(member);
    proceed(actions);
    return actions;
}

std::vector<double> StoreRule::clocks() const {
    std::vector<double> found;
    for (const Member& m : members_) found.push_back(m.left ? std::numeric_limits<double>::infinity() : double(m.clock));
    return found;
}

std::vector<int> StoreRule::ended() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (members_[m].ended) found.push_back(int(m));
    }
    return found;
}

std::vector<int> StoreRule::resting() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (members_[m].resting) found.push_back(int(m));
    }
    return found;
}

std::vector<int> StoreRule::missing() const {
    std::vector<int> found;
    for (std::size_t m = 0; m < members_.size(); ++m) {
        if (!members_[m].resting && !members_[m].ended) found.push_back(int(m));
    }
    return found;
}

bool StoreRule::may_be_served(const Read& read) const {
    return std::all_of(members_.begin(), members_.end(),
                       [&](const Member& m) { return !m.at_work() || m.clock >= read.least; });
}

void StoreRule::drop_read(int member) {
    waiting_.erase(std::remove_if(waiting_.begin(), waiting_.end(), [&](const Read& r) { return r.member == member; }),
                   waiting_.end());
}

void StoreRule::proceed(Actions& actions) {
    for (;;) {
        // Who is at work changes with what is served, for the next look.
        std::vector<Read> ready, others;
        for (const Read& read : waiting_) (may_be_served(read) ? ready : others).push_back(read);
        if (ready.empty()) break;
        waiting_ = std::move(others);
        for (const Read& read : ready) {
            Member& reader = members_[std::size_t(read.member)];
            reader.seen = version_;
            reader.absent = false;
            actions.push_back(StoreAction{StoreAction::Kind::serve, read.member, read.ticket});
        }
    }
    const auto rests = [](const Member& m) { return m.resting; };
    if (std::any_of(members_.begin(), members_.end(), rests) && missing().empty()) settle(actions);
}

void StoreRule::settle(Actions& actions) {
    ++settled_;
    std::int64_t latest = kAny;
    for (const Member& m : members_) latest = std::max(latest, m.clock);
    StoreAction action{StoreAction::Kind::settle};
    for (std::size_t k = 0; k < members_.size(); ++k) {
        Member& m = members_[k];
        if (!m.left) m.clock = latest;
        if (m.ended) continue;
        m.resting = m.absent = false;
        m.seen = version_;
        drop_read(int(k));
        action.members.push_back(int(k));
    }
    actions.push_back(std::move(action));
}

}  // namespace bitring
